"""How much memory a process took, and what it asks of the system's allocator and page cache."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from hf_fedlarge.errors import MemoryFullError

# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD; the last takes no more than 32 MiB.
_KEEP = {-1: 2**28, -2: 2**24, -3: 2**25}
# What torch says where it isn't an OutOfMemoryError: its allocator on CPUs, the driver and cuBLAS.
_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22  # Linux' own; the second is not in Python's mmap
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far, memory-mapped pages included.

    Linux's own figure comes first: there `getrusage` counts what the parent had when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_bytes() -> float:
    """What the GPU has that is computed on; infinity where there is none."""
    if not torch.cuda.is_available():
        return float("inf")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def used_bytes(device: torch.device) -> int:
    """What this process holds of its own: on CUDA what tensors take there, else memory that no file stands behind."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's or torch's says that there is no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


@contextmanager
def saying_out_of_memory(device: torch.device) -> Iterator[None]:
    """Within it, an error that says that there is no memory left on `device`, or none at all, becomes a sentence.

    Raises:
        MemoryFullError: there was none left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryFullError(
            f"Training ran out of memory with {used_bytes(device) / 1e6:.0f} MB in use ({device}): give "
            "--memory-budget, or a smaller one, or lower --max_length or the batch."
        ) from error


def keep_freed_memory() -> None:
    """Make glibc keep what tensors free instead of giving it back, which costs a page fault for each of their pages."""
    if hasattr(_libc, "mallopt"):  # musl has none
        for option, value in _KEEP.items():
            _libc.mallopt(option, value)


def give_back_freed_memory() -> None:
    """Make glibc give the system what it kept, however it lies between what is still in use."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def fetch_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Ask the system to read memory-mapped tensors from the disk; returns when they are there, holding no lock.

    A hint to read ahead (MADV_WILLNEED) on a large range reads some of it only; populating reads all (Linux 5.14).
    """
    _advise(tensors, _MADV_POPULATE_READ)


def forget_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Take the pages of memory-mapped tensors from this process; when they are used again they are mapped again.

    They stay in the system's cache as long as it has room. Only for tensors that lie in a file and that nobody wrote
    to: others would be zeros.
    """
    _advise(tensors, _MADV_DONTNEED)


def _advise(tensors: Iterable[torch.Tensor], advice: int) -> None:
    if _libc is None:
        return
    for tensor in tensors:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
