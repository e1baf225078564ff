"""Federated fine-tuning of large Hugging Face models on machines too small for them.

    global checkpoint → shrink → package → client training ×N → updates → aggregate → adapter → merge → checkpoint

Each stage is a function of `hf_fedlarge.api`, a command of `hf-fedlarge`, and a thin program in `scripts/` or
`trainers/`.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

# Installed, `trainers`, `scripts` and `model_cards` lie in this directory. In a checkout, where Python finds this one
# first if it is started there, they lie beside it.
_checkout = Path(__file__).parent.parent
if not (_checkout / "hf_fedlarge" / "trainers").is_dir():
    __path__.append(str(_checkout))

# On import bitsandbytes, which peft imports too, warns that a kernel package which is not used here is absent.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# GNU's OpenMP lets waiting threads spin, without a limit that matters: where anything else runs on the same cores, as
# on any client's machine, a training step then takes several times as long. Not spinning costs a fifth of a small
# model's step on a quiet machine, as waking a thread takes longer than many an operation. So they spin for half a
# millisecond (docs/log.md). It must be known before torch loads, and whoever sets it otherwise is heard.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# oneDNN, and torch's layer on it, compile kernels for every length of a batch and keep a thousand, a gigabyte in a
# process that trains many clients (docs/log.md). A step needs some thirty a length.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("LRU_CACHE_CAPACITY", "512")

_HOME = {
    "FedLargeError": "errors",
    "load_package": "package",
    "load_tokenizer": "package",
    "save_adapter": "package",
}
__all__ = ["FedLargeError", "load_package", "load_tokenizer", "save_adapter"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing torch, transformers and bitsandbytes takes seconds that `--help` need not wait.
    if name in _HOME:
        return getattr(importlib.import_module(f"hf_fedlarge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_fedlarge' has no attribute {name!r}")
