"""What computes, and what it computes fastest.

Not every processor multiplies matrices in bf16 well. Without AMX Intel's take twice as long as in fp32 where there is
AVX512-BF16, and any many times where there is neither (docs/log.md; ARM was not measured). AMD's AVX512-BF16 is taken
to be faster than fp32 is there, which is inferred: the two were not compared. fp16 takes ten times as long without
AVX512-FP16. So there matrices are dense in fp32 and products are of fp32, whatever the dtype of all else.
"""

from __future__ import annotations

import torch

# What a CPU must have one of, that products of a dtype are worth it.
_NEEDS = {torch.bfloat16: ("amx_bf16",), torch.float16: ("amx_fp16", "avx512_fp16")}
_NEEDS_OF_AMD = _NEEDS | {torch.bfloat16: ("avx512_bf16",)}


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what products are computed fastest: fp32 for bf16 and fp16 on a CPU that is slow with them, else `dtype`.

    It rests on what the processor is and can, not on a measurement, so that a machine always computes the same.
    """
    if device.type == "cpu" and dtype in _NEEDS:
        has = torch.cpu.get_capabilities()
        needs = _NEEDS_OF_AMD if "AMD" in str(has.get("cpu_name", "")) else _NEEDS
        return dtype if any(has.get(name, False) for name in needs[dtype]) else torch.float32
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
