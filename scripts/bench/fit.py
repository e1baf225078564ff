"""What making a package costs: seconds, and the largest memory above what the imports take, in a fresh process.

    python scripts/bench/fit.py --tokens 16384 --json fit.json
    python scripts/bench/fit.py --keep-layers 22 --layer-choice influence

`plan_package` and `make_package` of SmolLM2-135M-Instruct with Python's documentation as calibration text: reading it,
choosing layers, the fit and writing the package. Mapped pages of the checkpoint count as resident. The package's digest
is printed as well: where it stays the same, only the cost changed. Another number of threads gives another one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import harness

CHECKPOINT = Path("demo/SmolLM2-135M-Instruct")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration text")
    parser.add_argument("--keep-layers")
    parser.add_argument("--keep-neurons", type=float)
    parser.add_argument("--layer-choice", default="uniform")
    harness.add_common_options(parser)
    parser.set_defaults(pairs=1)
    options = parser.parse_args()
    if not (CHECKPOINT / "config.json").exists():
        parser.error(f"{CHECKPOINT} is missing; run `make demo` once.")
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    runs = harness.alternate({"ours": {}}, options.pairs)
    report = harness.summarize(runs, vars(options))
    harness.show(report, f"A package from {options.tokens:,} tokens", options.json)
    print("digest:", report["ours"]["digest"])
    return 0


def measure(options: argparse.Namespace) -> harness.Figures:
    """Make a package in this process; its figures."""
    from transformers import LlamaForCausalLM  # noqa: F401 (else imported while the clock runs)

    from hf_fedlarge.calibrate import calibration_sequences, make_package, plan_package
    from hf_fedlarge.config import PackageSettings
    from hf_fedlarge.package import load_tokenizer
    from hf_fedlarge.stdlib_corpus import standard_library_prose

    settings = PackageSettings(
        keep_layers=options.keep_layers, keep_neurons=options.keep_neurons, layer_choice=options.layer_choice
    )
    with tempfile.TemporaryDirectory() as directory, harness.MemoryPeak() as peak:
        started = time.perf_counter()
        tokenizer = load_tokenizer(CHECKPOINT)
        sequences = calibration_sequences(tokenizer, standard_library_prose(), options.tokens)
        plan = plan_package(CHECKPOINT, settings, sequences=sequences)
        manifest = make_package(plan, settings, Path(directory) / "package")
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        **peak.figures(),
        "digest": manifest.digest,
        "tokens": sum(ids.numel() for ids in sequences),
    }


if __name__ == "__main__":
    sys.exit(main())
