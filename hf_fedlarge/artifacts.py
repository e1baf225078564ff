"""Artifacts: directories with a manifest, written to a temporary name and renamed when whole.

Every stage takes directories and makes one. `fedlarge.json`, the manifest, says what the directory is, gives the size
and SHA-256 of each of its files, and names its parents by digest. An artifact's digest is the SHA-256 of its manifest
as canonical JSON without `measured`, the figures that differ from one machine to the next: the same inputs give the
same digest wherever they were computed. It says that nothing changed; who wrote it says a signature (`keys.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ValidationError

from hf_fedlarge.config import ClientName, Codec, LoraSettings, first_problem
from hf_fedlarge.entries import (
    BaseModelEntry,
    Contribution,
    Count,
    DataFiles,
    Digest,
    FileEntry,
    FileName,
    HealedEntry,
    LayerEntry,
    Loss,
    SurrogateEntry,
)
from hf_fedlarge.errors import ArtifactError, OutputError, os_problem
from hf_fedlarge.ledger import PrivacyEntry
from hf_fedlarge.records import Growing
from hf_fedlarge.untrusted import read_json

MANIFEST_NAME = "fedlarge.json"
_HUB_FILES = {".gitattributes", ".cache", "README.md", "FEDLARGE.md"}
MAX_MANIFEST_BYTES = 16 * 2**20
# Of an adapter's files, those that clients don't need: the carry, which is a part of the federation's state, and what
# only the server's optimizer goes on with. That isn't published, nor what only corrects the clients' steps.
CARRY_WEIGHTS = "carry.safetensors"
MOMENTUM_WEIGHTS = "server_momentum.safetensors"
VARIANCE_WEIGHTS = "server_variance.safetensors"
CONTROL_WEIGHTS = "control.safetensors"
UNPUBLISHED_FILES = frozenset({MOMENTUM_WEIGHTS, VARIANCE_WEIGHTS, CONTROL_WEIGHTS})
SERVER_FILES = frozenset({MOMENTUM_WEIGHTS, VARIANCE_WEIGHTS, CARRY_WEIGHTS})


class Manifest(Growing):
    """What every manifest has. `measured` holds figures of one machine and one run; the digest leaves it out."""

    max_bytes: ClassVar[int] = MAX_MANIFEST_BYTES
    kind: str
    format_version: Literal[1] = 1
    files: dict[FileName, FileEntry]
    measured: dict[str, float] = {}

    @property
    def canonical(self) -> bytes:
        """The canonical JSON of everything but `measured`."""
        body = self.model_dump(mode="json", exclude={"measured"})
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical`."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, the manifest itself left out."""
        return sum(entry.size for entry in self.files.values())


class PackageManifest(Manifest):
    """A shrunk model: which layers it kept, what stands for the others, and how each weight is stored."""

    max_bytes: ClassVar[int] = 2**20
    later: ClassVar[str | None] = "healed"
    kind: Literal["package"] = "package"
    files: DataFiles
    base: BaseModelEntry
    model_type: str
    layers: list[LayerEntry]
    embeddings: Literal["int8", "nf4", "bf16"]
    codecs: dict[str, Literal["nf4", "int8", "dense"]]
    surrogates: list[SurrogateEntry] = []
    healed: HealedEntry | None = None

    @property
    def kept_layers(self) -> list[int]:
        """Global numbers of the kept layers; the index is the package's own block number."""
        kept = [entry for entry in self.layers if entry.block is not None]
        return [entry.layer for entry in sorted(kept, key=lambda entry: entry.block)]


class UpdateManifest(Manifest):
    """What one client trained in one round, on which package, from which adapter.

    With a `roster` it is masked for the clients of it (`secagg.py`), and says neither examples, tokens nor losses.
    """

    max_bytes: ClassVar[int] = 2**16
    later: ClassVar[str | None] = "roster"
    kind: Literal["update"] = "update"
    client: ClientName
    round: Count
    package: Digest
    adapter: Digest | None
    lora: LoraSettings
    codec: Codec = Codec()
    examples: Count
    tokens: Count
    loss_before: Loss | None = None
    loss_after: Loss | None = None
    roster: Digest | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What the journal keeps of its client's word."""
        losses = {"loss_before": self.loss_before, "loss_after": self.loss_after}
        known = {name: loss for name, loss in losses.items() if loss is not None}
        return {"tokens": self.tokens, "seconds": self.measured.get("seconds")} | known


class AdapterManifest(Manifest):
    """The federation's state after a round: one adapter in fp32, in global layer numbers.

    `trains` is what the clients of the next round train; the other factor comes back as it is. What didn't fit into the
    adapter's rank is in the carry, of up to `carry_rank` (0: there is none): the server's alone, but a part of what is
    merged and published. Of the energy of both, `energy_carried` is the carry's share, and `energy_dropped` is what is
    in neither. With `privacy` clients clip what they send, and nothing of any single one is here.
    """

    later: ClassVar[str | None] = "privacy"
    kind: Literal["adapter"] = "adapter"
    files: DataFiles
    base: BaseModelEntry
    package: Digest
    parent: Digest | None
    round: Count
    layers: list[Count]
    lora: LoraSettings
    aggregator: str | None
    weighting: str | None = None
    contributions: list[Contribution] = []
    energy_dropped: float = 0.0
    energy_carried: float = 0.0
    carry_rank: Count = 0
    trains: Literal["both", "A", "B"] = "both"
    server_optimizer: str | None = None
    privacy: PrivacyEntry | None = None


class CheckpointManifest(Manifest):
    """A merged checkpoint: the base with an adapter folded in."""

    kind: Literal["checkpoint"] = "checkpoint"
    base: BaseModelEntry
    adapter: Digest
    merged: list[str]


KINDS: dict[str, type[Manifest]] = {
    model.model_fields["kind"].default: model
    for model in (PackageManifest, UpdateManifest, AdapterManifest, CheckpointManifest)
}


ManifestT = TypeVar("ManifestT", bound=Manifest)


def read_manifest(directory: Path, kind: type[ManifestT]) -> ManifestT:
    """Read and check the manifest of `directory`, which must be of `kind`; its files are not read (`verify_files`).

    Raises:
        ArtifactError: no such directory, no manifest, another kind, or a manifest that doesn't hold together.
    """
    wanted = kind.model_fields["kind"].default
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory; expected {_article(wanted)} made by hf-fedlarge.")
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(f"{directory} has no {MANIFEST_NAME}, so it is not {_article(wanted)} made by hf-fedlarge.")
    raw = read_json(path, kind.max_bytes)
    found = raw.get("kind") if isinstance(raw, dict) else None
    if found != wanted:
        raise ArtifactError(f"{directory} is of kind {found!r:.80}; expected {_article(wanted)}.")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a valid {wanted} manifest: {first_problem(error)}.") from error


def manifest_kind(directory: Path) -> str | None:
    """The kind the manifest of `directory` declares, or None where there is no readable manifest."""
    path = directory / MANIFEST_NAME
    try:
        raw = read_json(path, MAX_MANIFEST_BYTES) if path.is_file() else None
    except ArtifactError:
        return None
    kind = raw.get("kind") if isinstance(raw, dict) else None
    return kind if isinstance(kind, str) and kind in KINDS else None


def verify_files(
    directory: Path,
    manifest: Manifest,
    *,
    published: bool = False,
    unneeded: frozenset[str] = frozenset(),
    beside: str | None = None,
) -> None:
    """Check that `directory` holds exactly the manifest's files, each with its size and SHA-256.

    Args:
        directory: the artifact.
        manifest: its manifest.
        published: it may have come from the Hub, which adds a card and keeps files as links into its cache.
        unneeded: files that may be missing.
        beside: a file that may be there too; who allows it checks it.

    Raises:
        ArtifactError: a file is missing, extra, of another size or digest; the message names it.
    """
    present = {path.name for path in directory.iterdir()} - {MANIFEST_NAME, beside}
    if published:
        present -= _HUB_FILES - set(manifest.files)
    for name in sorted(set(manifest.files) - present - unneeded):
        raise ArtifactError(f"{directory} lacks {name}, which its manifest lists; fetch it again.")
    for name in sorted(present - set(manifest.files)):
        raise ArtifactError(f"{directory} holds {name}, which its manifest does not list; remove it.")
    for name, entry in manifest.files.items():
        if name in unneeded and name not in present:
            continue
        path = directory / name
        if (path.is_symlink() and not published) or not path.is_file():
            raise ArtifactError(f"{path} is not a regular file.")
        size = path.stat().st_size
        if size != entry.size:
            raise ArtifactError(f"{path} has {size} bytes; its manifest says {entry.size}: fetch it again.")
        found = sha256_of(path)
        if found != entry.sha256:
            raise ArtifactError(
                f"{path} has the digest {found[:12]}…; its manifest says {entry.sha256[:12]}…: fetch it again."
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read a megabyte at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    return FileEntry(size=path.stat().st_size, sha256=sha256_of(path))


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Entries for every file of `directory` but the manifest, sorted by name."""
    return {path.name: file_entry(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST_NAME}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into `directory`, as indented JSON with a final newline."""
    write_json(directory / MANIFEST_NAME, manifest.model_dump(mode="json"))


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON by way of a temporary name, so that a reader sees all of it or the old file."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless `overwrite`; refuse to replace anything that isn't an artifact of ours."""
    if not output.exists() and not output.is_symlink():
        if any(parent.is_file() for parent in output.parents):
            raise OutputError(f"{output} could not be written: a parent of it is a file, not a directory.")
        return
    if not overwrite:
        raise OutputError(f"{output} exists already; choose another output or add --overwrite.")
    empty = output.is_dir() and not any(output.iterdir())
    if output.is_symlink() or not (empty or manifest_kind(output)):
        raise OutputError(f"{output} was not made by hf-fedlarge, so --overwrite leaves it alone; remove it yourself.")


@contextmanager
def staged_directory(output: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `output` that becomes `output` when the block ends without an error.

    Args:
        output: the directory to make.
        overwrite: replace an artifact of ours that is there already.
        resume: keep what was written when the block fails or is killed, and yield it again next time.

    Raises:
        OutputError: `output` exists, its parent can't be written, or the disk is full; nothing visible was written.
    """
    check_output(output, overwrite)
    staging = output.with_name(f".{output.name}.partial")
    with writing(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            if staging.exists() and not resume:
                shutil.rmtree(staging)
            staging.mkdir(exist_ok=True)
            yield staging
            commit_directory(staging, output)
        except BaseException:
            if not resume:
                shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Within it, an error of the system that a user can mend is an `OutputError` that names `output`."""
    try:
        yield
    except OSError as error:
        reason = os_problem(error)
        if isinstance(error, OutputError) or reason is None:
            raise
        raise OutputError(f"{output} could not be written: {reason}.") from error


def commit_directory(staging: Path, output: Path) -> None:
    """Flush `staging` to disk and rename it to `output`, replacing what was there."""
    for path in staging.iterdir():
        if path.is_file():
            sync(path)
    sync(staging)
    if output.exists():
        retired = output.with_name(f".{output.name}.retired")
        if retired.exists():
            shutil.rmtree(retired)
        output.replace(retired)
        staging.replace(output)
        shutil.rmtree(retired)
    else:
        staging.replace(output)
    sync(output.parent)


def sync(path: Path) -> None:
    """Wait until what was written of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
