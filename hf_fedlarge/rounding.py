"""Matrices as they will be once a package has stored them: what is fitted must be fitted to those."""

from __future__ import annotations

import torch

from hf_fedlarge.quantize import DenseWeight, FrozenWeight, decode, encode

_ROWS = 1024  # encoded at a time; whole blocks of 64 values


def round_trip(name: str, codec: str, values: torch.Tensor) -> tuple[dict[str, torch.Tensor], FrozenWeight]:
    """The tensors in which a package stores the matrix `name`, on the CPU, and the matrix that they give back.

    Raises:
        ArtifactError: a value is infinite or not a number.
    """
    tensors = encode(name, tuple(values.shape), codec, values.split(_ROWS))
    return tensors, decode(name, codec, tensors)


def dense(weight: FrozenWeight, dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
    """All rows of a stored matrix."""
    values = torch.empty(weight.shape, dtype=dtype, device=device)
    weight.read_rows(0, len(values), values)
    return values


class RoundedWeight:
    """A dense matrix that reads as if a package had stored it; it is rounded anew each time.

    Args:
        weight: as a checkpoint has it.
        codec: of the package.
        transposed: whether a package stores it the other way round.
    """

    def __init__(self, weight: DenseWeight, codec: str, transposed: bool) -> None:
        self._weight, self._codec, self._transposed = weight, codec, transposed

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._weight.shape[::-1] if self._transposed else self._weight.shape

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """What it is read from."""
        return self._weight.stored

    def read_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write the rows [start, stop) into `out` as they would be."""
        self.rounded().read_rows(start, stop, out)

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows at `index` as they would be."""
        return self.rounded().gather(index, dtype)

    def rounded(self) -> FrozenWeight:
        """What a package would hold, in memory."""
        (values,) = self.stored
        return round_trip("weight", self._codec, values.T if self._transposed else values)[1]
