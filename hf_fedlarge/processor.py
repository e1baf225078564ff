"""What computes, and what it computes fastest.

Not every processor multiplies matrices in bf16 well. Without AMX it takes twice as long as in fp32 where there is
AVX512-BF16, and many times where there is neither (docs/log.md; ARM was not measured). So there matrices are dense in
fp32 and products are of fp32, whatever the dtype of all else.
"""

from __future__ import annotations

import torch


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what products are computed fastest: fp32 for bf16 on a CPU without matrix instructions (AMX), else `dtype`.

    It rests on what the processor can, not on a measurement, so that a machine always computes the same.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("amx_bf16", False):
        return torch.float32
    return dtype


def computing_device() -> torch.device:
    """What clients and evaluations compute on: the GPU that torch sees first, or the CPU where it sees none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """For whoever starts a command: a GPU by its name, or the CPU with the threads that torch takes of it."""
    if device.type == "cuda":
        return f"computing on {device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"computing on the CPU, {threads} thread{'s' if threads > 1 else ''}"
