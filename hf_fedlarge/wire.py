"""An encoded update's one file: the change of each factor from the adapter that its client started from.

Both ends know that adapter, the package and the codec, so the file holds nothing else: no names and no shapes of
factors. Its header is checked in full before any of its data is read, and one module at a time is decoded. `codec.py`
has the codecs and how factors lie in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open

from hf_fedlarge.adapters import AdapterReader, expected_shapes, factor_name, in_package
from hf_fedlarge.architectures import Architecture
from hf_fedlarge.codec import CHANGED, Layout, Shape, decode
from hf_fedlarge.config import Codec, LoraSettings
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.quantize import Infos
from hf_fedlarge.tensors import Factors, SafetensorsWriter, StoredFactors, read_header

ENCODED_WEIGHTS = "update.safetensors"


@dataclass(frozen=True)
class Wire:
    """What client and server both know of an encoded update.

    Attributes:
        codec: any but fp32.
        parent: the adapter that the client started from.
        architecture: the package's.
        layers: which of the base's layers the package's blocks are.
        lora: the adapter's settings.
    """

    codec: Codec
    parent: AdapterReader
    architecture: Architecture
    layers: list[int]
    lora: LoraSettings

    @cached_property
    def shapes(self) -> dict[str, tuple[Shape, Shape]]:
        """Module → shapes of A (R, I) and B (O, R), in the order of the file."""
        return expected_shapes(self.architecture, self.layers, self.lora)

    def parent_factors(self, module: str) -> Factors:
        """The parent's factors as far as the package has them, fp32: what a client that learned nothing would send."""
        return in_package(module, self.parent.read(module), self.architecture, self.layers)

    def layout(self, changed: Mapping[str, bool]) -> Layout:
        """Where things lie in a file that holds these factors."""
        return Layout(rank_first(self.shapes), changed, self.codec)


def rank_first(shapes: Mapping[str, tuple[Shape, Shape]]) -> dict[str, Shape]:
    """Each factor's name → the shape in which it is encoded: (R, I) of A, (R, O) of B."""
    return {
        factor_name(module, letter): (shape[::-1] if letter == "B" else shape)
        for module, pair in shapes.items()
        for letter, shape in zip("AB", pair, strict=True)
    }


def write_encoded(path: Path, encoded: Mapping[str, Mapping[str, torch.Tensor]], wire: Wire) -> None:
    """Write the parts of the factors that changed, by `adapters.factor_name`; `codec.encode` makes them."""
    names = rank_first(wire.shapes)
    layout = wire.layout({name: name in encoded for name in names})
    with SafetensorsWriter(path, layout.infos) as writer:
        for part in layout.infos:
            for name in layout.places:
                if part != CHANGED:
                    writer.write(part, encoded[name][part])
        writer.write(CHANGED, torch.tensor([name in encoded for name in names], dtype=torch.uint8))


class EncodedReader:
    """The factors of an encoded update, as `AdapterReader` gives those of an adapter.

    Attributes:
        modules: paths in global numbers.
    """

    def __init__(self, path: Path, wire: Wire) -> None:
        """Check the header; of the data, a byte a factor is read.

        Raises:
            ArtifactError: no safetensors, or its tensors are not those of this codec and adapter.
        """
        self._path, self._wire = path, wire
        self.modules = list(wire.shapes)
        names = [factor_name(module, letter) for module in self.modules for letter in "AB"]
        infos = {name: (info.dtype, info.shape) for name, info in read_header(path).items()}
        expected = wire.layout(dict.fromkeys(names, False)).infos
        for name in sorted(set(infos) ^ set(expected)):
            raise ArtifactError(f"its tensor {name[:200]!r} is {'not expected' if name in infos else 'missing'}.")
        _check_infos(infos, {CHANGED: expected[CHANGED]})
        with safe_open(path, framework="pt") as file:
            flags = file.get_tensor(CHANGED).tolist()
        if not set(flags) <= {0, 1}:
            raise ArtifactError(f"its tensor {CHANGED} holds {max(flags)}; expected 0 or 1 for each factor.")
        self._layout = wire.layout(dict(zip(names, map(bool, flags), strict=True)))
        _check_infos(infos, self._layout.infos)

    def __contains__(self, module: str) -> bool:
        return module in self._wire.shapes

    def read(self, module: str) -> Factors:
        """The module's fp32 factors: the parent's as it is, or what the package has of it plus the decoded change.

        Raises:
            ArtifactError: scales or places that no encoder makes.
        """
        factors = []
        pairs = zip(self._wire.parent.read(module), self._wire.parent_factors(module), strict=True)
        for letter, (factor, packaged) in zip("AB", pairs, strict=True):
            if places := self._layout.places.get(factor_name(module, letter)):
                with safe_open(self._path, framework="pt") as file:
                    parts = {part: file.get_slice(part)[place] for part, place in places.items()}
                rank_first_shape = tuple(factor.shape if letter == "A" else factor.T.shape)
                try:
                    change_RX = decode(parts, self._wire.codec, rank_first_shape)
                except ArtifactError as error:
                    raise ArtifactError(f"its {letter} of {module} is damaged: {error}.") from error
                factor = packaged + (change_RX if letter == "A" else change_RX.T)
            factors.append(factor.contiguous())
        return Factors(*factors)

    def stored(self, module: str) -> StoredFactors:
        """Likewise, to be read when they are needed."""
        return StoredFactors(partial(self.read, module), self._wire.shapes[module])


def _check_infos(found: Infos, expected: Infos) -> None:
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            raise ArtifactError(
                f"its tensor {name} is {found[name][0]} {found[name][1]}; expected {dtype} {shape} for the factors "
                "that changed."
            )
