"""What making a package costs: seconds, and the largest memory above what the imports take, in a fresh process.

    python scripts/bench/fit.py --tokens 16384 --json fit.json
    python scripts/bench/fit.py --keep-layers 22 --layer-choice influence
    python scripts/bench/fit.py --shape 1.7b --tokens 16384 --keep-neurons 0.67

`plan_package` and `make_package` of SmolLM2-135M-Instruct with Python's documentation as calibration text, or of a
generated model of another `--shape` with random tokens: reading them, choosing layers, the fit and writing the package.
Mapped pages of the checkpoint count as resident. The package's digest is printed as well: where it stays the same, only
the cost changed. Another number of threads gives another one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import harness
import shapes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", *shapes.SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int, help="decoder blocks of a generated shape; else as many as it has")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration text")
    parser.add_argument("--keep-layers")
    parser.add_argument("--keep-neurons", type=float)
    parser.add_argument("--layer-choice", default="uniform")
    parser.add_argument("--width-choice", default="error")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    harness.add_common_options(parser)
    parser.set_defaults(pairs=1)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    with harness.workplace(options) as directory:
        checkpoint = harness.DEMO_MODEL
        if options.shape != "smollm2":
            checkpoint = Path(directory) / f"{options.shape}-{options.layers or 'all'}"
        if not (checkpoint / "config.json").exists():
            if options.shape == "smollm2":
                parser.error(f"{checkpoint} is missing; run `make demo` once.")
            shapes.write_checkpoint(options.shape, checkpoint, options.layers)
        options.checkpoint = checkpoint
        runs = harness.alternate({"ours": {}}, options.pairs, ["--checkpoint", str(checkpoint)])
    report = harness.summarize(runs, vars(options))
    harness.show(report, f"A package from {options.tokens:,} tokens", options.json)
    print("digest:", report["ours"]["digest"])
    return 0


def measure(options: argparse.Namespace) -> harness.Figures:
    """Make a package in this process; its figures."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM  # noqa: F401 (else imported while the clock runs)

    from hf_fedlarge.calibrate import LENGTH, calibration_sequences, make_package, plan_package
    from hf_fedlarge.config import PackageSettings
    from hf_fedlarge.package import load_tokenizer
    from hf_fedlarge.stdlib_corpus import standard_library_prose

    checkpoint = options.checkpoint
    settings = PackageSettings(
        keep_layers=options.keep_layers,
        keep_neurons=options.keep_neurons,
        layer_choice=options.layer_choice,
        width_choice=options.width_choice,
    )
    with tempfile.TemporaryDirectory() as directory, harness.MemoryPeak() as peak:
        started = time.perf_counter()
        if options.shape == "smollm2":
            tokenizer = load_tokenizer(checkpoint)
            sequences = calibration_sequences(tokenizer, standard_library_prose(), options.tokens)
        else:
            words = AutoConfig.from_pretrained(checkpoint).vocab_size
            size, generator = (options.tokens // LENGTH, 1, LENGTH), torch.Generator().manual_seed(0)
            sequences = list(torch.randint(3, words, size, generator=generator))
        plan = plan_package(checkpoint, settings, sequences=sequences)
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
