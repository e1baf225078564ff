"""What C does on a CPU: a step's elementwise work in one pass, attention's gradient, products with NF4; merging.

What torch computes in several operations goes through memory several times, and wakes its threads for each. Python
calls these functions, of the C files beside it, through ctypes, as it does bitsandbytes'. GCC compiles them for this
processor when they are first needed, within seconds, and they are kept in the cache. Where there is no GCC torch's
operations do the same work in more time; `HF_FEDLARGE_KERNELS=off` asks for that.

Numbers are those of torch's operations in fp32, rounded once, but for the last bits of e^x and of sums. So processes
whose runs are to end with the same bytes have them all, or none.

Shapes: N tokens, D hidden, F neurons, V values of the vocabulary, R rows, C columns; B sequences, T tokens, H heads, G
heads of keys and values, E values a head.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from threading import Lock

import torch

from hf_fedlarge.cache import cache_directory, is_own

_FILES = ("kernels.c", "attention.c", "linear.c", "merge.c", "amx.h", "nf4.h", "bf16.h")
_SOURCES = [Path(__file__).with_name(name) for name in _FILES]
# None that lets the compiler change a result: a product and a sum stay two roundings, and NaN stays NaN.
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp"]
_COMPILER_SECONDS = 120
_ALONE = 2**13  # values that one thread has done before another is awake
_C_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double, "i": ctypes.c_int}
_ARGUMENTS = {
    "rms_norm": "ppppllfi",
    "rms_norm_gradient": "ppppplli",
    "gate": "pppli",
    "gate_gradient": "ppppppli",
    "softmax_slice": "ppfpppplli",
    "int8_rows": "ppplli",
    "nf4": "ppppppllfi",
    "attention_gradient": "pppppppppplllllfi",
    "attention_bytes": "ll",
    "nf4_linear": "pppppppppppllllfii",
    "nf4_linear_bytes": "llllii",
    "add_product": "pppppllldf",
}
_RESULTS = {  # of the others, nothing
    "attention_bytes": ctypes.c_int64,
    "nf4_linear_bytes": ctypes.c_int64,
    "add_product": ctypes.c_int,
}
COMPUTED = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # what results may be in, and what C calls it

_loading = Lock()
_logger = logging.getLogger(__name__)


class Kernels:
    """The functions of the C files. Tensors are contiguous, on the CPU, and bf16 where nothing else is said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def rms_norm(self, x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x / rms · weight of x (…, D), rounded before the weight as Llama does, and 1 / rms (…, 1), fp32."""
        out = torch.empty_like(x)
        inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._call("rms_norm", "", x, weight_D, out, inverse, inverse.numel(), len(weight_D), epsilon, _threads(x))
        return out, inverse

    def rms_norm_gradient(
        self, x: torch.Tensor, inverse: torch.Tensor, weight_D: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of x (…, D) from that of the output."""
        out = torch.empty_like(x)
        sizes = inverse.numel(), len(weight_D), _threads(x)
        self._call("rms_norm_gradient", "", x, inverse, weight_D, grad, out, *sizes)
        return out

    def gate(self, activation: str, gate_NF: torch.Tensor, up_NF: torch.Tensor, out_NF: torch.Tensor) -> None:
        """Write act(gate) · up to `out_NF`, bf16 or fp32; `activation` is "silu" or "gelu_tanh"."""
        kind = f"_{activation}_{COMPUTED[out_NF.dtype]}"
        self._call("gate", kind, gate_NF, up_NF, out_NF, gate_NF.numel(), _threads(gate_NF))

    def gate_gradient(
        self,
        activation: str,
        gate_NF: torch.Tensor,
        up_NF: torch.Tensor,
        grad_NF: torch.Tensor,
        value_NF: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up from that of act(gate) · up, bf16 or fp32; that is written to `value_NF`."""
        kind = f"_{activation}_{COMPUTED[grad_NF.dtype]}"
        value_NF = torch.empty_like(grad_NF) if value_NF is None else value_NF
        found = torch.empty_like(gate_NF), torch.empty_like(up_NF)
        sizes = gate_NF.numel(), _threads(gate_NF)
        self._call("gate_gradient", kind, gate_NF, up_NF, grad_NF, *found, value_NF, *sizes)
        return found

    def softmax_slice(
        self,
        logits_NR: torch.Tensor,
        labels_N: torch.Tensor,
        scale: float,
        top_N: torch.Tensor,
        others_N: torch.Tensor,
        label_logit_N: torch.Tensor,
    ) -> torch.Tensor:
        """Take a slice of the vocabulary into a softmax's sums; `logits_NR` becomes e^(logit − top), 0 at labels.

        Args:
            logits_NR: bf16 or fp32.
            labels_N: int64, a column; outside of [0, R) it is in another slice.
            scale: of the logits.
            top_N: fp32, the largest logit so far, which is brought up to date.
            others_N: fp32, the sum of e^(logit − top) over what is not the label's, likewise.
            label_logit_N: fp32, where the label's is written to.

        Returns:
            (N,) fp32, what sums under the former `top_N` are to be multiplied by.
        """
        decay_N = torch.empty_like(top_N)
        given = logits_NR, labels_N.contiguous(), scale, top_N, others_N, label_logit_N, decay_N
        self._call("softmax_slice", f"_{COMPUTED[logits_NR.dtype]}", *given, *logits_NR.shape, _threads(logits_NR))
        return decay_N

    def int8_rows(self, values_RC: torch.Tensor, scales_R: torch.Tensor, out_RC: torch.Tensor) -> None:
        """Write int8 values times their row's fp32 scale to `out_RC`, bf16 or fp32."""
        sizes = *values_RC.shape, _threads(values_RC)
        self._call("int8_rows", f"_{COMPUTED[out_RC.dtype]}", values_RC, scales_R, out_RC, *sizes)

    @property
    def has_nf4(self) -> bool:
        """Whether the processor has the instructions that `nf4` is written for (AVX-512)."""
        return hasattr(self._library, "nf4")

    def nf4(
        self,
        packed: torch.Tensor,
        codes: torch.Tensor,
        outer: torch.Tensor,
        code: torch.Tensor,
        offset: float,
        table: torch.Tensor,
        first: int,
        out: torch.Tensor,
    ) -> None:
        """Write whole blocks of 64 values, from the block `first` on, to `out`: what bitsandbytes' kernel gives.

        Args:
            packed: uint8, two values a byte, the first in the high half.
            codes: uint8, the scale of each block, as code[codes] · outer + offset.
            outer: fp32, one for 256 blocks.
            code: (256,) fp32.
            offset: of the scales.
            table: (16,) fp32, what the halves of a byte mean.
            first: a block's number.
            out: bf16, of so many blocks.
        """
        sizes = first, out.numel() // 64, offset, _threads(out)
        self._call("nf4", "", packed, codes, outer, code, table, out, *sizes)

    @cached_property
    def has_tiles(self) -> bool:
        """Whether the processor has AMX, and the system lets this process use it."""
        return hasattr(self._library, "may_use_tiles") and bool(self._library.may_use_tiles())

    def nf4_linear(
        self,
        x_NK: torch.Tensor,
        scales: Sequence[torch.Tensor],
        offset: float,
        shape: tuple[int, int],
        turned: bool,
        u_NR: torch.Tensor | None,
        more: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x W + u E + bias, (N, P), summed in fp32 and rounded once, or with `turned` x Wᵀ + u Eᵀ + bias. Needs tiles.

        Args:
            x_NK: the left factor.
            scales: `packed`, `codes`, `outer`, `code` and `table` of `nf4`, for W.
            offset: of the scales.
            shape: of W as it is stored; columns are a multiple of 64.
            turned: whether it is multiplied by W's transpose.
            u_NR: of a second product; None: there is none.
            more: E, stored as W is: (R, P), or (P, R).
            bias: (P,).
        """
        (N, K), R = x_NK.shape, 0 if u_NR is None else u_NR.shape[1]
        P, threads = shape[0 if turned else 1], torch.get_num_threads() if math.prod(shape) > _ALONE else 1
        out_NP = x_NK.new_empty(N, P)
        work = x_NK.new_empty(self.nf4_linear_bytes(N, K, P, R, turned, threads), dtype=torch.uint8)
        given = x_NK, *scales, u_NR, more, bias
        self._call("nf4_linear", "", *given, out_NP, work, N, K, P, R, offset, turned, threads)
        return out_NP

    def nf4_linear_bytes(self, N: int, K: int, P: int, R: int = 0, turned: bool = True, threads: int = 0) -> int:
        """What such a product takes of memory beside its result; `threads` 0: as many as torch has."""
        return self._call("nf4_linear_bytes", "", N, K, P, R, turned, threads or torch.get_num_threads())

    def add_product(
        self, rows_NM: torch.Tensor, left_NR: torch.Tensor, right_RM: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, bool]:
        """rows + scale · left right, as if summed in fp64 and rounded once, and whether that is finite. Of one thread.

        Args:
            rows_NM: what is added to.
            left_NR: fp32.
            right_RM: fp32.
            scale: the factor before the product.
        """
        out_NM, R = torch.empty_like(rows_NM), left_NR.shape[1]
        work = left_NR.new_empty(R, 64)
        # A sum of R products is off by R roundings of the sum of their sizes, at most (Higham 2002, section 3.1), which
        # is no larger than the product of two norms; and by others of the scale, of its product, and below 2⁻¹²⁶. Where
        # fp32 can't say how far, each value is computed in fp64.
        norms = [
            torch.linalg.vector_norm(factor, dim=dim, dtype=torch.float64).max().item() if factor.numel() else 0.0
            for factor, dim in ((left_NR, 1), (right_RM, 0))
        ]
        off = abs(scale) * math.prod(norms)
        if off:
            off = 1.01 * (R + 4) * (off * 2.0**-24 + max(1.0, abs(scale)) * 2.0**-149)
        fp32 = torch.finfo(torch.float32)
        if not off < fp32.max or 0 < abs(scale) < fp32.tiny:
            off = math.inf
        given = rows_NM, left_NR, right_RM, out_NM, work
        return out_NM, bool(self._call("add_product", "", *given, *rows_NM.shape, R, scale, off))

    def attention_gradient(
        self,
        q_BTHE: torch.Tensor,
        k_BTGE: torch.Tensor,
        v_BTGE: torch.Tensor,
        out_BTHE: torch.Tensor,
        grad_BTHE: torch.Tensor,
        lse_BTH: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of queries, keys and values of causal attention; E is even, H a multiple of G.

        What is multiplied is bf16, as everywhere, and sums are fp32 (FlashAttention-2: arXiv 2307.08691).

        Args:
            q_BTHE: queries.
            k_BTGE: keys.
            v_BTGE: values.
            out_BTHE: softmax(scale · q kᵀ, causal) v.
            grad_BTHE: its gradient.
            lse_BTH: fp32, the logarithms of the softmax' sums.
            scale: of the scores.
        """
        batch, tokens, heads, size = q_BTHE.shape
        groups = k_BTGE.shape[2]
        threads = torch.get_num_threads()
        places = min(threads, batch * groups)
        work = q_BTHE.new_empty(places * self._call("attention_bytes", "", tokens, size), dtype=torch.uint8)
        given = q_BTHE, k_BTGE, v_BTGE, out_BTHE, grad_BTHE, lse_BTH
        found = torch.empty_like(q_BTHE), torch.empty_like(k_BTGE), torch.empty_like(v_BTGE)
        sizes = batch, tokens, heads, groups, size
        self._call("attention_gradient", "", *given, *found, work, *sizes, scale, threads)
        return found

    def _call(self, name: str, kind: str, *arguments: torch.Tensor | float | None) -> int | None:
        # An attribute of the library, so that it is looked up and described once.
        function = getattr(self._library, name + kind)
        if function.argtypes is None:
            function.argtypes = [_C_TYPES[letter] for letter in _ARGUMENTS[name]]
            function.restype = _RESULTS.get(name)
        return function(*(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments))


def kernels_for(*tensors: torch.Tensor) -> Kernels | None:
    """The kernels, if there are any and they can take these bf16 tensors; else torch's operations have to do."""
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
    return kernels()


def kernels() -> Kernels | None:
    """The kernels, compiled now if they have never been; None where they can't be, or are not wanted."""
    with _loading:  # of several threads that need them first one compiles, and the others wait
        return _load()


@cache
def _load() -> Kernels | None:
    if os.environ.get("HF_FEDLARGE_KERNELS") == "off":
        return None
    try:
        return Kernels(_compiled())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        _logger.info(
            "Torch's operations take the place of compiled ones, in more time: %s", said[-1] if said else error
        )
        return None


def _compiled() -> ctypes.CDLL:
    flags = [*_FLAGS, "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else _FLAGS
    key = hashlib.sha256("\0".join([*flags, _processor(), *map(Path.read_text, _SOURCES)]).encode()).hexdigest()[:16]
    kept = cache_directory() / f"kernels-{key}.so"
    with suppress(OSError):  # it isn't there, or broken
        if is_own(kept):  # nobody else's code is run
            return ctypes.CDLL(str(kept))
    compiler = shutil.which("gcc")
    if compiler is None:
        raise OSError("GCC was not found")
    with tempfile.TemporaryDirectory(prefix="hf-fedlarge-") as directory:
        made = Path(directory, kept.name)
        sources = [str(path) for path in _SOURCES if path.suffix == ".c"]
        command = [compiler, *flags, "-shared", "-fPIC", *sources, "-o", str(made), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILER_SECONDS)
        # Where nothing can be kept the next process compiles again. Where nothing may run from here it may from there.
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            Path(shutil.copy(made, kept.with_name(f".{kept.name}.{os.getpid()}"))).replace(kept)
            return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(made))


def _processor() -> str:
    """What it is and can do: a home may be shared by machines, and code for one of them stop another."""
    with suppress(OSError):
        first = takewhile(bool, Path("/proc/cpuinfo").read_text().splitlines())
        return "".join(line for line in first if line.startswith(("model name", "flags", "Features")))
    return platform.processor()


def _threads(tensor: torch.Tensor) -> int:
    return torch.get_num_threads() if tensor.numel() > _ALONE else 1
