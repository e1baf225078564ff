"""How the change of a LoRA factor travels: bf16, int8, NF4 or its largest entries; pure functions on tensors.

A change is taken rank-first, R rows of X values: A_RI as it is, B_OR turned. So the rows are the rank's directions, and
int8 needs one scale for each. `fp32` is not encoded at all: such an update is an ordinary PEFT adapter (`update.py`).

- `bf16`: 2 bytes a value, off by at most 1/256 of it.
- `int8`: a byte a value and a byte a row for its scale, a quarter of an octave fine; off by at most 1/213 of the row's
  largest, or 2⁻⁴⁸. With a scale in fp32 it would be 1/254, and the file a little more than a quarter of fp32's.
- `nf4` (QLoRA, arXiv 2305.14314): half a byte a value and a bf16 scale for 64; off by about a sixth of their largest.
  The scales are not quantized in turn, as those of weights are: A's and B's differ too much for one offset.
- `topk` (arXiv 1704.05021): the share of the entries that is largest, an int32 place and a bf16 value each. The rest
  is lost unless what is lost is carried over (`feedback.py`).

Entropy coding is left out: a size that is known before the data is what bounds a hostile file and a byte budget.

A file holds each kind of part once, all factors' end to end: two header entries for each of some hundred factors would
be two percent of an int8 update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from hf_fedlarge.config import Codec
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.quantize import BLOCK, NF4_CODE, Infos, encode_rows

Shape = tuple[int, int]
_STEPS, _LOWEST = 4, 48  # int8's scales: steps an octave, and how many octaves below 1 they begin


def stored_parts(codec: Codec, shape: Shape) -> dict[str, tuple[torch.dtype, int]]:
    """dtype and length of the flat tensors that `encode` makes of a change of this shape, wider dtypes first."""
    rows, columns = shape
    count = rows * columns
    if codec.name == "bf16":
        return {"values": (torch.bfloat16, count)}
    if codec.name == "int8":
        return {"scales": (torch.uint8, rows), "values": (torch.int8, count)}
    if codec.name == "nf4":
        return {"scales": (torch.bfloat16, -(-count // BLOCK)), "values": (torch.uint8, -(-count // 2))}
    assert codec.name == "topk", codec
    kept = math.ceil(codec.topk_share * count)
    return {"indices": (torch.int32, kept), "values": (torch.bfloat16, kept)}


def encode(change_RX: torch.Tensor, codec: Codec) -> dict[str, torch.Tensor]:
    """The parts of a finite fp32 change (R, X); the same bits for the same change.

    Raises:
        ArtifactError: int8 and NF4 have no infinity and no NaN.
    """
    if codec.name == "bf16":
        return {"values": change_RX.bfloat16().flatten()}
    if codec.name == "topk":
        flat = change_RX.flatten()
        kept = math.ceil(codec.topk_share * len(flat))
        # A stable sort, because which of equal entries `topk` takes is not said.
        places = flat.abs().argsort(descending=True, stable=True)[:kept].sort().values
        return {"indices": places.int(), "values": flat[places].bfloat16()}
    if codec.name == "int8":
        largest_R1 = change_RX.abs().amax(dim=1, keepdim=True)
        if not largest_R1.isfinite().all():
            raise ArtifactError("The change of a factor holds infinite values or NaN; lower the learning rate.")
        # Rounded up, so that the largest fits; a row of zeros has the smallest.
        octaves_R1 = (largest_R1.double() / 127).log2()
        codes_R1 = ((octaves_R1 + _LOWEST) * _STEPS).ceil().clamp(0, 255).to(torch.uint8)
        values_RX = (change_RX / _scales(codes_R1)).round().clamp(-127, 127).to(torch.int8)
        return {"scales": codes_R1.flatten(), "values": values_RX.flatten()}
    parts = encode_rows("values", codec.name, change_RX)
    return {"scales": parts["values.absmax"].bfloat16(), "values": parts["values"].flatten()}


def decode(parts: Mapping[str, torch.Tensor], codec: Codec, shape: Shape) -> torch.Tensor:
    """The change (R, X) in fp32, from parts of the dtypes and lengths that `stored_parts` says.

    Raises:
        ArtifactError: a scale that is negative or not finite, or places that are not rising within the change.
    """
    rows, columns = shape
    values = parts["values"]
    if codec.name == "bf16":
        return values.float().view(shape)
    if codec.name == "topk":
        places = parts["indices"].long()
        if not ((places >= 0) & (places < rows * columns)).all() or not (places[1:] > places[:-1]).all():
            raise ArtifactError(f"its indices are not rising numbers from 0 to {rows * columns - 1}")
        return torch.zeros(rows * columns).index_copy_(0, places, values.float()).view(shape)
    if codec.name == "int8":
        return values.view(shape).float() * _scales(parts["scales"])[:, None]
    scales = parts["scales"].float()
    if not (scales.isfinite() & (scales >= 0)).all():
        raise ArtifactError("one of its scales is negative or not a finite number")
    codes = torch.stack((values >> 4, values & 15), dim=1).flatten()[: rows * columns]
    return (NF4_CODE[codes.long()] * scales.repeat_interleave(BLOCK)[: rows * columns]).view(shape)


def _scales(codes: torch.Tensor) -> torch.Tensor:
    """What int8's codes of scales mean, fp32."""
    return torch.exp2(codes.double() / _STEPS - _LOWEST).float()


class Layout:
    """Where the parts of each changed factor lie in a file's flat tensors.

    Attributes:
        infos: name → dtype and shape of the file's tensors, `changed` among them.
        places: changed factor → part → the slice of that tensor which is its own.
    """

    def __init__(self, shapes: Mapping[str, Shape], changed: Mapping[str, bool], codec: Codec) -> None:
        """Plan a file.

        Args:
            shapes: every factor of the adapter, in the file's order, rank-first.
            changed: which of them the file holds.
            codec: how.
        """
        # Named even where nothing changed.
        ends = dict.fromkeys(stored_parts(codec, (1, 1)), 0)
        dtypes = {part: dtype for part, (dtype, _) in stored_parts(codec, (1, 1)).items()}
        self.places: dict[str, dict[str, slice]] = {}
        for name, shape in shapes.items():
            if changed[name]:
                lengths = {part: length for part, (_, length) in stored_parts(codec, shape).items()}
                self.places[name] = {part: slice(ends[part], ends[part] + length) for part, length in lengths.items()}
                ends = {part: place.stop for part, place in self.places[name].items()}
        self.infos: Infos = {part: (dtypes[part], (end,)) for part, end in ends.items()}
        self.infos[CHANGED] = (torch.uint8, (len(shapes),))


CHANGED = "changed"  # a byte a factor, 1 where the file holds it: one that did not change is the parent's, bit for bit
