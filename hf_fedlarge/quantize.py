"""How a frozen matrix is stored small and read back: NF4 (bitsandbytes), int8 by rows, or dense.

NF4 is QLoRA's 4-bit float (arXiv 2305.14314): blocks of 64 values share one scale, and the scales are quantized to 8
bits in turn, in blocks of 256 around their mean. The tensors have the names and the meaning of bitsandbytes' own
serialization, so that stock transformers reads them. int8 stores round(127 · row / max|row|) and one fp32 scale a row;
embeddings and heads use it because a lookup or a slice of the vocabulary then needs only its own rows.

bitsandbytes is imported here alone. `Linear4bit.forward` is never called: on some processors an evaluation repacks
its weights and later gradients are wrong. On the CPU its C function, or ours (`kernels.py`), dequantizes straight into
the caller's buffer; a fresh tensor each time, as its Python function makes, costs 15 to 20 times as much.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib as _native

from hf_fedlarge.blocks import Buckets
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.kernels import COMPUTED, kernels

BLOCK = 64
NESTED_BLOCK = 256
# The quantization state is JSON whose length varies with its digits. Trailing blanks make it known in advance.
_STATE_BYTES = 256
_NF4_STATE = "quant_state.bitsandbytes__nf4"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KERNELS = {
    dtype: kernel
    for dtype, name in (
        (torch.bfloat16, "cdequantize_blockwise_cpu_nf4_bf16"),
        (torch.float16, "cdequantize_blockwise_cpu_nf4_fp16"),
        (torch.float32, "cdequantize_blockwise_cpu_nf4_fp32"),
    )
    if (kernel := getattr(_native._lib, name, None)) is not None  # `_native` itself never lacks a name
}
for _kernel in _KERNELS.values():
    _kernel.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3
NF4_CODE = bnb.get_4bit_type("nf4", device="cpu")
_nf4_codes = Buckets((NF4_CODE[:-1] + NF4_CODE[1:]) / 2)
_PIECE_VALUES = 2**17  # encoded at a time, whole blocks of 64: what that needs stays in a core's cache

Infos = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class FrozenWeight(Protocol):
    """A frozen matrix of `shape` (rows, columns), however it is stored."""

    shape: tuple[int, int]

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The tensors that grow with the matrix, as stored."""

    def read_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write rows [start, stop) into `out`, contiguous, of shape (stop - start, columns), in its dtype."""

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows `index` (1-D, int64) as a new tensor (len(index), columns)."""


@dataclass(frozen=True)
class Nf4Weight:
    """A matrix in NF4 with doubly quantized scales; the tensors may be memory-mapped and stay on the CPU.

    Attributes:
        shape: rows and columns of the matrix.
        packed: uint8, two values a byte, the first in the high half.
        absmax: uint8 (blocks,), the quantized scale of each block of 64 values in row-major order.
        nested_code: fp32 (256,), what the codes of `absmax` mean.
        nested_absmax: fp32, one scale for 256 entries of `absmax`.
        offset: the mean of the scales, taken off before they were quantized.
    """

    shape: tuple[int, int]
    packed: torch.Tensor
    absmax: torch.Tensor
    nested_code: torch.Tensor
    nested_absmax: torch.Tensor
    offset: float

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """See `FrozenWeight.stored`."""
        return self.packed, self.absmax

    def read_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `FrozenWeight.read_rows`."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        kernel = _KERNELS.get(out.dtype)
        # The AVX-512 kernel is wrong for rows that are no multiple of the block, so it is shown rows of one block;
        # what doesn't start and end on a block goes by table.
        if first % BLOCK or last % BLOCK or (kernel is None and out.device.type == "cpu"):
            out.copy_(self._lookup(torch.arange(first, last)).view(out.shape))
            return
        compiled = kernels() if out.device.type == "cpu" and out.dtype == torch.bfloat16 else None
        if compiled is not None and compiled.has_nf4:
            scales = self.absmax, self.nested_absmax, self.nested_code
            compiled.nf4(self.packed, *scales, self.offset, NF4_CODE, first // BLOCK, out)
            return
        packed = self.packed.view(-1)[first // 2 : last // 2]
        scales = self._scales(first // BLOCK, last // BLOCK)
        rows, width = (stop - start, columns) if columns % BLOCK == 0 else ((last - first) // BLOCK, BLOCK)
        if out.device.type == "cpu":
            kernel(packed.data_ptr(), scales.data_ptr(), out.data_ptr(), BLOCK, rows, width)
        else:
            packed, scales = packed.to(out.device, non_blocking=True), scales.to(out.device, non_blocking=True)
            dequantize = torch.ops.bitsandbytes.dequantize_4bit.out
            dequantize(packed.view(-1, 1), scales, BLOCK, "nf4", out.shape, out.dtype, out=out)

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `FrozenWeight.gather`."""
        columns = self.shape[1]
        places = index.to("cpu")[:, None] * columns + torch.arange(columns)
        return self._lookup(places.view(-1)).view(len(index), columns).to(index.device, dtype)

    def _scales(self, first: int, last: int) -> torch.Tensor:
        """Scales of the blocks [first, last), fp32."""
        start, end = first // NESTED_BLOCK, -(-last // NESTED_BLOCK)
        codes, outer = self.absmax[start * NESTED_BLOCK : end * NESTED_BLOCK], self.nested_absmax[start:end]
        scales = bnb.dequantize_blockwise(codes, absmax=outer, code=self.nested_code, blocksize=NESTED_BLOCK)
        return scales[first - start * NESTED_BLOCK : last - start * NESTED_BLOCK].add_(self.offset)

    def _scale_of(self, blocks: torch.Tensor) -> torch.Tensor:
        codes = self.nested_code[self.absmax[blocks].long()]
        return codes * self.nested_absmax[blocks // NESTED_BLOCK] + self.offset

    def _lookup(self, places: torch.Tensor) -> torch.Tensor:
        """The values at these places of the flattened matrix, fp32, by table."""
        pairs = self.packed.view(-1)[places // 2]
        codes = torch.where(places % 2 == 0, pairs >> 4, pairs & 15).long()
        return NF4_CODE[codes] * self._scale_of(places // BLOCK)


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in int8 (rows, columns) with one fp32 scale a row."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return tuple(self.values.shape)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """See `FrozenWeight.stored`."""
        return self.values, self.scales

    def read_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `FrozenWeight.read_rows`."""
        compiled = kernels() if out.device.type == "cpu" and out.dtype in COMPUTED else None
        if compiled is not None:
            compiled.int8_rows(self.values[start:stop], self.scales[start:stop], out)
            return
        # A piece at a time, so that the fp32 product stays in a core's cache.
        step = max(1, _PIECE_VALUES // self.shape[1]) if out.device.type == "cpu" else stop - start
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            values = self.values[rows].to(out.device, torch.float32).mul_(self.scales[rows, None].to(out.device))
            out[first - start : rows.stop - start] = values

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `FrozenWeight.gather`."""
        place = index.to("cpu")
        return (self.values[place].float() * self.scales[place, None]).to(index.device, dtype)


@dataclass(frozen=True)
class DenseWeight:
    """A matrix stored as it is."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return tuple(self.values.shape)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """See `FrozenWeight.stored`."""
        return (self.values,)

    def read_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `FrozenWeight.read_rows`."""
        out.copy_(self.values[start:stop])

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `FrozenWeight.gather`."""
        return self.values[index.to("cpu")].to(index.device, dtype)


def encoded_infos(name: str, shape: tuple[int, int], codec: str) -> Infos:
    """dtype and shape of the tensors that `encode` makes of the parameter `name`, in its order."""
    rows, columns = shape
    count = rows * columns
    blocks = -(-count // BLOCK)
    if codec == "nf4":
        return {
            f"{name}.nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
            f"{name}.nested_quant_map": (torch.float32, (256,)),
            f"{name}.quant_map": (torch.float32, (16,)),
            name: (torch.uint8, (-(-count // 2), 1)),
            f"{name}.absmax": (torch.uint8, (blocks,)),
            f"{name}.{_NF4_STATE}": (torch.uint8, (_STATE_BYTES,)),
        }
    if codec == "int8":
        return {f"{name}_scale": (torch.float32, (rows,)), name: (torch.int8, shape)}
    return {name: (torch.bfloat16, shape)}


def encode(
    name: str, shape: tuple[int, int], codec: str, row_blocks: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors that `encoded_infos` announces, in memory, of a matrix that comes in blocks of rows.

    NF4 equals `bitsandbytes.functional.quantize_4bit` of the whole. `encode_rows` and `join_rows` are its two halves.

    Args:
        name: the parameter's name.
        shape: its rows and columns.
        codec: `nf4`, `int8` or `dense` (bf16).
        row_blocks: its rows in order, float; for `nf4` all but the last a multiple of 64 values.
    """
    parts: dict[str, list[torch.Tensor]] = {part: [] for part in encoded_infos(name, shape, codec)}
    for part, rows in join_rows(name, shape, codec, (encode_rows(name, codec, block) for block in row_blocks)):
        parts[part].append(rows)
    return {part: torch.cat(pieces) for part, pieces in parts.items()}


def encode_rows(name: str, codec: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a block of rows becomes, in any thread: the next rows of the tensors that `encoded_infos` announces.

    NF4's `absmax` is still in fp32; all blocks but a matrix' last must have a multiple of 64 values there.

    Raises:
        ArtifactError: a value is infinite or not a number.
    """
    if codec == "dense":
        return {name: rows.to(torch.bfloat16)}
    if not all(extreme.float().isfinite() for extreme in rows.aminmax()):
        raise ArtifactError(f"The matrix {name} holds infinite values or NaN; fetch the checkpoint again.")
    if codec == "nf4":
        pieces, encode_piece, scale = rows.contiguous().view(-1).split(_PIECE_VALUES), _nf4, f"{name}.absmax"
    else:
        pieces, encode_piece, scale = rows.split(max(1, _PIECE_VALUES // rows.shape[1])), _int8, f"{name}_scale"
    values, scales = zip(*map(encode_piece, pieces), strict=True)
    return {name: torch.cat(values), scale: torch.cat(scales)}


def join_rows(
    name: str, shape: tuple[int, int], codec: str, blocks: Iterable[dict[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `encoded_infos` announces, each by its next rows, from what `encode_rows` made of a matrix."""
    scales = []
    for block in blocks:
        if codec == "nf4":
            scales.append(block.pop(f"{name}.absmax"))
        yield from block.items()
    if codec != "nf4":
        return
    absmax = torch.cat(scales)
    offset = absmax.mean()
    codes, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    text = json.dumps(_state(shape, offset.item())).encode().ljust(_STATE_BYTES)
    assert len(text) == _STATE_BYTES
    yield f"{name}.nested_absmax", nested.absmax
    yield f"{name}.nested_quant_map", nested.code
    yield f"{name}.quant_map", NF4_CODE
    yield f"{name}.absmax", codes
    yield f"{name}.{_NF4_STATE}", torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales) of rows in int8."""
    scale = (rows.float().abs().amax(dim=1) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (rows / scale[:, None]).round_().to(torch.int8), scale


def _nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, absmax) of a vector in NF4: the bits of `bnb.quantize_4bit` in a fraction of its time."""
    if len(values) % BLOCK:  # bitsandbytes treats the last, shorter block in its own way
        packed, state = bnb.quantize_4bit(values.float(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        return packed, state.absmax
    blocks = values.float().view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    codes = _nf4_codes((blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1))
    pairs = codes.view(torch.int16)  # the first value in the low byte
    return pairs.mul(16).add_(pairs.bitwise_right_shift(8)).to(torch.uint8).view(-1, 1), absmax


class TensorSource(Protocol):
    """Anything that gives stored tensors by name."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """The stored tensor `name`."""

    def __contains__(self, name: str) -> bool:
        """Whether there is one."""


def decode(name: str, codec: str, tensors: TensorSource, *, shape: tuple[int, int] | None = None) -> FrozenWeight:
    """The matrix `name`, over the stored tensors as they are (memory-mapped ones stay so).

    Every part is checked here, because the C kernel is not told how long they are.

    Args:
        name: the parameter's name.
        codec: `nf4`, `int8` or `dense`, which may be of any float dtype.
        tensors: where its parts are.
        shape: the rows and columns that it must have; None: any.

    Raises:
        ArtifactError: a part is missing or is not what `encode` makes of a matrix of that shape.
    """
    if codec == "nf4":
        found, offset = _read_state(name, tensors)
    else:
        found = tuple(_stored(name, tensors).shape)
    if len(found) != 2 or shape not in (None, found):
        raise ArtifactError(
            f"The matrix {name} has the shape {found}; expected {shape or 'two dimensions'}: make its artifact again."
        )
    if codec == "dense":
        return DenseWeight(_stored(name, tensors, _FLOATS))
    parts = {
        part: _stored(part, tensors, (dtype,), part_shape)
        for part, (dtype, part_shape) in encoded_infos(name, found, codec).items()
    }
    if codec == "int8":
        return Int8Weight(parts[name], parts[f"{name}_scale"])
    return Nf4Weight(
        shape=found,
        packed=parts[name],
        absmax=parts[f"{name}.absmax"],
        nested_code=parts[f"{name}.nested_quant_map"],
        nested_absmax=parts[f"{name}.nested_absmax"],
        offset=offset,
    )


def _stored(
    part: str,
    tensors: TensorSource,
    dtypes: tuple[torch.dtype, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The stored tensor `part`, of one of `dtypes` and of `shape` (None: any)."""
    if part not in tensors:
        raise ArtifactError(f"The tensor {part} is missing; expected it beside the others: make its artifact again.")
    tensor = tensors[part]
    found = tuple(tensor.shape)
    if (dtypes and tensor.dtype not in dtypes) or shape not in (None, found):
        wanted = " or ".join(map(str, dtypes or ()))
        raise ArtifactError(
            f"The tensor {part} is {tensor.dtype} {found}; expected {wanted} {shape or found}: make its artifact again."
        )
    return tensor


def _state(shape: tuple[int, int], offset: float) -> dict[str, Any]:
    """What bitsandbytes wants to know of a matrix in NF4; all but the arguments is the same for every matrix."""
    return {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }


def _read_state(name: str, tensors: TensorSource) -> tuple[tuple[int, int], float]:
    """(shape, offset) of a matrix in NF4 whose stored state says nothing else than ours would."""
    part = f"{name}.{_NF4_STATE}"
    text = bytes(_stored(part, tensors, (torch.uint8,), (_STATE_BYTES,)).tolist())
    try:
        state = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"The tensor {part} is not JSON ({error}); make its artifact again.") from error
    match state:
        case {"shape": [int(rows), int(columns)], "nested_offset": float(offset)} if (
            rows > 0 and columns > 0 and math.isfinite(offset) and state == _state((rows, columns), offset)
        ):
            return (rows, columns), offset
    expected = _state((1, 1), 0.0) | {"shape": "[rows, columns]", "nested_offset": "a finite number"}
    raise ArtifactError(f"The tensor {part} holds {state}; expected {expected}: make its artifact again.")
