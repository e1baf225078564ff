"""Low-rank corrections of a package's matrices: W + B A, where W is stored in 4 bits and B A beside it.

They are added when a matrix is dequantized, so that whoever computes with it knows nothing of them, and one of them
costs as much as computing a few tokens more. `heal.py` makes them.

Shapes: O and I as the package stores the matrix, R the corrections' rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_fedlarge.architectures import Architecture
from hf_fedlarge.quantize import FrozenWeight, TensorSource, decode
from hf_fedlarge.rounding import dense, round_trip
from hf_fedlarge.tensors import Factors

CODEC = "int8"  # of both factors


@dataclass(frozen=True)
class CorrectedWeight:
    """A stored matrix and its correction, as one `FrozenWeight`.

    Attributes:
        weight: (O, I).
        A: (R, I).
        Bt: B transposed, (R, O): int8 has a scale for each row, of which there should be few.
    """

    weight: FrozenWeight
    A: FrozenWeight
    Bt: FrozenWeight

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.weight.shape

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """What it is read from."""
        return *self.weight.stored, *self.A.stored, *self.Bt.stored

    def read_rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write the rows [start, stop) into `out`."""
        self.weight.read_rows(start, stop, out)
        A_RI, Bt_RO = (dense(factor, out.dtype, out.device) for factor in (self.A, self.Bt))
        out.addmm_(Bt_RO[:, start:stop].T, A_RI)

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows at `index`."""
        rows = self.weight.gather(index, dtype)
        A_RI, Bt_RO = (dense(factor, dtype, rows.device) for factor in (self.A, self.Bt))
        return rows.addmm_(Bt_RO[:, index].T, A_RI)


def is_correctable(architecture: Architecture, name: str, codec: str | None) -> bool:
    """Whether a package with corrections has one for its matrix `name`: those of the blocks, in 4 bits."""
    return codec == "nf4" and architecture.layer_of(name) is not None


def store_correction(name: str, A_RI: torch.Tensor, B_OR: torch.Tensor) -> tuple[dict[str, torch.Tensor], Factors]:
    """The tensors in which a package has the correction of its matrix `name`, on the CPU, and what they give back."""
    tensors, values = {}, []
    for own, factor in zip(_names(name), (A_RI, B_OR.T.contiguous()), strict=True):
        found, weight = round_trip(own, CODEC, factor)
        tensors |= found
        values.append(dense(weight, torch.float32))
    return tensors, Factors(values[0], values[1].T)


def corrected(name: str, weight: FrozenWeight, rank: int, tensors: TensorSource) -> CorrectedWeight:
    """The matrix `name` with the correction that is among a package's tensors.

    Raises:
        ArtifactError: it is not there, or of another shape.
    """
    rows, columns = weight.shape
    first, second = _names(name)
    A = decode(first, CODEC, tensors, shape=(rank, columns))
    return CorrectedWeight(weight, A, decode(second, CODEC, tensors, shape=(rank, rows)))


def _names(name: str) -> tuple[str, str]:
    return f"{name}.correction_A", f"{name}.correction_B"
