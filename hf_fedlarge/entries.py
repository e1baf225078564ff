"""What manifests are made of: digests and counts within bounds, files, layers, and what stands for something else."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from hf_fedlarge.records import Growing, Record
from hf_fedlarge.untrusted import without_code

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
# A mean cross-entropy is far from the bound, and rounded it may be just below 0. What losses weigh stays finite.
Loss = Annotated[float, Field(ge=-1e6, le=1e6)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]


def is_file_name(name: str) -> bool:
    """Whether a manifest can list a file of this name: hidden ones and those with spaces can't be."""
    try:
        TypeAdapter(FileName).validate_python(name)
    except ValidationError:
        return False
    return True


class FileEntry(Record):
    """One file of an artifact."""

    size: Count
    sha256: Digest


DataFiles = Annotated[dict[FileName, FileEntry], AfterValidator(without_code)]


class BaseModelEntry(Growing):
    """The checkpoint everything goes back to: Hub id or directory name, revision if any, digest of its weights.

    Its `license` is an identifier of the Hub, or the name of another one, with a `license_link` if its card gives that.
    """

    later: ClassVar[str | None] = "license_link"
    id: str
    revision: str | None = None
    digest: Digest
    license: str | None = None
    license_link: str | None = None


class LayerEntry(Record):
    """One layer of the base model: its number there, and the package's block that holds it (None: dropped).

    `neurons` is how many of its feed-forward layer's neurons that block has (None: all).
    """

    layer: Count
    block: Count | None
    neurons: Annotated[int, Field(ge=1)] | None = None


class SurrogateEntry(Growing):
    """What stands for a run of dropped layers: the layers, how its matrix is stored, and how well it fits.

    `unexplained` is the share of the calibration's (weighted) squared change over the run that it does not explain.
    `rank` is that of a map stored as two matrices; without one it is a single matrix, and isn't written down.
    """

    later: ClassVar[str | None] = "rank"
    layers: Annotated[list[Count], Field(min_length=1)]
    codec: Literal["nf4", "int8", "dense"]
    unexplained: Annotated[float, Field(ge=0, le=1)]
    rank: Annotated[int, Field(ge=1)] | None = None


class HealedEntry(Record):
    """Corrections of the blocks' 4-bit matrices; KL(full ‖ small) on public text without and with them, nats/token."""

    rank: Annotated[int, Field(ge=1)]
    without: float
    divergence: float


class Contribution(Record):
    """One accepted update and the share it had in the aggregate, and by how many rounds it came late."""

    client: str
    digest: Digest
    weight: float
    examples: Count
    tokens: Count
    staleness: Count = 0
