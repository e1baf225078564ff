"""A store: a place that the server and its clients can both read and write, named by any URL that fsspec knows.

A local or shared directory, `s3://bucket/prefix`, `gs://…`, `hf://…`, `sftp://…`, `memory://…`: whatever moves whole
files. Artifacts lie in it by content, so that what is there already is never sent again, and a name says what the bytes
under it have to be:

    objects/aa/SHA256         a file of some artifact
    artifacts/DIGEST.json     an artifact's manifest, written after its files: an artifact is there whole or not at all

An artifact can also lie at a place of its own with its files by name (`send`, `fetch`), as updates do in their inbox.
Nothing that is read is believed: a manifest is bounded before it is parsed, a file's size is compared before it is
fetched and its SHA-256 before anything opens it. A download that broke off goes on with the bytes that are missing.

How files are moved is in `remote.py`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_fedlarge.artifacts import (
    KINDS,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    ManifestT,
    manifest_kind,
    read_manifest,
    sha256_of,
    staged_directory,
    verify_files,
)
from hf_fedlarge.entries import FileEntry
from hf_fedlarge.errors import ArtifactError, OutputError, StoreError
from hf_fedlarge.remote import RemoteFiles

ARTIFACTS = "artifacts"
# What comes in one request; a download that breaks off loses at most so much.
CHUNK_BYTES = 16 * 2**20
LOCK_SECONDS = 6 * 3600  # for another process on this machine that fetches the same
_GONE = "it was removed with an old round, or is still on its way"


class Store(RemoteFiles):
    """A store at a URL (`RemoteFiles` has what it takes and raises)."""

    # Artifacts by content

    def put(self, directory: Path, *, leave_out: frozenset[str] = frozenset()) -> str:
        """Make an artifact available; what the store has of it already isn't sent.

        Args:
            directory: the artifact, which is checked first.
            leave_out: names of files that stay here, such as those only a server needs.

        Returns:
            Its digest, by which `get` finds it.

        Raises:
            ArtifactError: `directory` isn't a whole artifact.
            StoreError: the store can't be written.
        """
        kind = manifest_kind(directory)
        if kind is None:
            raise ArtifactError(f"{directory} has no readable {MANIFEST_NAME}; expected an artifact of hf-fedlarge.")
        manifest = read_manifest(directory, KINDS[kind])
        verify_files(directory, manifest, unneeded=leave_out)
        for name, entry in manifest.files.items():
            if name not in leave_out:
                self.put_file(directory / name, entry)
        path, raw = artifact_path(manifest.digest), (directory / MANIFEST_NAME).read_bytes()
        if self._size(path) != len(raw) or self.read(path, len(raw)) != raw:
            self._upload(directory / MANIFEST_NAME, path)
        return manifest.digest

    def get(
        self,
        digest: str,
        destination: Path,
        kind: type[ManifestT],
        *,
        most_bytes: int | None = None,
        leave_out: frozenset[str] = frozenset(),
        local: Callable[[ManifestT, Path], None] | None = None,
    ) -> ManifestT:
        """Have an artifact at `destination`: it stays if it is there and whole, else it is fetched and replaces it.

        Processes that want the same destination wait for the first one. What was fetched before an interruption is
        kept beside it and is not fetched again.

        Args:
            digest: the artifact's.
            destination: the directory to make; only another artifact of ours is replaced.
            kind: what it must be.
            most_bytes: that its files may have together, as it was announced; None: as its manifest says.
            leave_out: names of files that are not wanted.
            local: is given the manifest and a directory, and may make files there of what is on this machine; one that
                isn't what the manifest says is fetched.

        Returns:
            Its manifest.

        Raises:
            ArtifactError: what the store has under this digest is something else; nothing of it is kept.
            StoreError: the store can't be read, or lacks it.
            OutputError: `destination` is not ours to replace, or can't be written.
        """
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ArtifactError(f"{digest!r:.80} is not a digest; expected 64 hexadecimal digits.")
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _alone(destination):
            try:
                here = read_manifest(destination, kind)
                verify_files(destination, here, unneeded=leave_out)
                if here.digest == digest:
                    return here
            except ArtifactError:
                pass  # not there, or damaged since
            raw = self._needed(artifact_path(digest), MAX_MANIFEST_BYTES)
            place = artifact_path(digest)
            return self._fetch(raw, place, destination, kind, most_bytes, leave_out, digest, local=local)

    def put_file(self, path: Path, entry: FileEntry) -> None:
        """Make a file available by its content, which is `entry`'s; it isn't sent if it is there.

        Raises:
            StoreError: the store can't be written.
        """
        if self._size(object_path(entry.sha256)) != entry.size:
            self._upload(path, object_path(entry.sha256))

    def get_file(self, entry: FileEntry, destination: Path) -> None:
        """Fetch a file by its content.

        Raises:
            ArtifactError: it is something else; nothing of it is kept.
            StoreError: the store can't be read, or lacks it.
        """
        self._download(object_path(entry.sha256), entry, destination)

    # Artifacts at a place of their own

    def send(self, directory: Path, place: str) -> None:
        """Copy an artifact to `place`, its manifest last.

        Raises:
            StoreError: the store can't be written.
        """
        files = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST_NAME)
        for name in [*files, MANIFEST_NAME]:
            self._upload(directory / name, f"{place}/{name}")

    def fetch(
        self,
        place: str,
        destination: Path,
        kind: type[ManifestT],
        *,
        most_bytes: int,
        manifest_bytes: int,
        beside: tuple[str, int] | None = None,
    ) -> ManifestT | None:
        """Fetch what `send` left at `place`; None while its manifest isn't there.

        Args:
            place: where it lies.
            destination: the directory to make.
            kind: what it must be.
            most_bytes: that its files may have together.
            manifest_bytes: that its manifest may have.
            beside: a small file that the manifest doesn't list, to be fetched if it is there, and bytes it may have.

        Raises:
            ArtifactError: it is something else, larger, or not what its manifest says; nothing of it is kept.
            StoreError: the store can't be read, or lacks a file that the manifest lists.
            OutputError: `destination` exists or can't be written.
        """
        raw = self.read(f"{place}/{MANIFEST_NAME}", manifest_bytes)
        if raw is None:
            return None
        name, most = beside or ("", 0)
        more = self.read(f"{place}/{name}", most) if beside else None
        return self._fetch(raw, place, destination, kind, most_bytes, more=() if more is None else [(name, more)])

    def _fetch(
        self,
        raw: bytes,
        place: str,
        destination: Path,
        kind: type[ManifestT],
        most_bytes: int | None,
        leave_out: frozenset[str] = frozenset(),
        digest: str | None = None,
        more: Sequence[tuple[str, bytes]] = (),
        local: Callable[[ManifestT, Path], None] | None = None,
    ) -> ManifestT:
        """The artifact of a manifest that was read; with a `digest` its files are objects, else they lie at `place`."""
        with staged_directory(destination, overwrite=digest is not None, resume=True) as staging:
            # Written again after an interruption: what else is there was fetched for the same destination.
            (staging / MANIFEST_NAME).write_bytes(raw)
            try:
                manifest = self._announced(staging, place, kind, digest)
                wanted = {name: entry for name, entry in manifest.files.items() if name not in leave_out}
                total = sum(entry.size for entry in wanted.values())
                if most_bytes is not None and total > most_bytes:
                    raise ArtifactError(
                        f"{self.url}/{place} lists {total} bytes of files; expected {most_bytes} at most."
                    )
            except ArtifactError:
                (staging / MANIFEST_NAME).unlink()
                raise
            free = shutil.disk_usage(staging).free + sum(path.stat().st_size for path in staging.iterdir())
            if total > free:
                raise OutputError(
                    f"{destination} takes {total} bytes, but {free} are free; make room or choose elsewhere."
                )
            for path in staging.iterdir():
                if path.name not in {MANIFEST_NAME, *wanted, *map(_partial, wanted.values())}:
                    path.unlink()
            for name, content in more:
                (staging / name).write_bytes(content)
            if local is not None:
                local(manifest, staging)
            for name, entry in wanted.items():
                if (staging / name).exists() and sha256_of(staging / name) == entry.sha256:
                    continue
                remote = f"{place}/{name}" if digest is None else object_path(entry.sha256)
                self._download(remote, entry, staging / _partial(entry))
                (staging / _partial(entry)).replace(staging / name)
        return manifest

    def _announced(self, staging: Path, place: str, kind: type[ManifestT], digest: str | None) -> ManifestT:
        """The manifest that was read from `place` into `staging`, if it is what it should be."""
        try:
            manifest = read_manifest(staging, kind)
        except ArtifactError as error:
            raise ArtifactError(f"{self.url}/{place} is refused: {error}") from error
        if digest is not None and manifest.digest != digest:
            raise ArtifactError(
                f"{self.url}/{place} describes the artifact {manifest.digest[:12]}…; expected {digest[:12]}…: have the "
                "server put it there again."
            )
        return manifest

    def _download(self, path: str, entry: FileEntry, target: Path) -> None:
        """Fetch what `target` lacks of a file, and check all of it; it is removed if it is not what it should be."""
        size = self._size(path)
        if size is None:
            raise StoreError(f"{self.url}/{path} is not there, although a manifest lists it: {_GONE}.")
        if size != entry.size:
            raise ArtifactError(
                f"{self.url}/{path} has {size} bytes; its manifest says {entry.size}: it has to be put there again."
            )
        if target.exists() and target.stat().st_size > entry.size:
            target.unlink()
        resumed = target.exists()
        with target.open("ab") as file:
            while (have := file.tell()) < entry.size:
                end = min(have + CHUNK_BYTES, entry.size)
                try:
                    got = self._call("cat_file", self._at(path), start=have, end=end)
                except FileNotFoundError as error:
                    raise StoreError(f"{self.url}/{path} is not there any more: {_GONE}.") from error
                if len(got) != end - have:
                    raise StoreError(f"{self.url}/{path} gave {len(got)} bytes from {have}; expected {end - have}.")
                file.write(got)
        found = sha256_of(target)
        if found != entry.sha256:
            target.unlink()
            if resumed:  # what was here already may be what is damaged
                self._download(path, entry, target)
                return
            raise ArtifactError(
                f"{self.url}/{path} has the SHA-256 {found[:12]}…; its manifest says {entry.sha256[:12]}…: it was "
                "discarded and has to be put there again."
            )

    def _needed(self, path: str, most_bytes: int) -> bytes:
        raw = self.read(path, most_bytes)
        if raw is None:
            raise StoreError(f"{self.url}/{path} is not there; expected an artifact that a server put there: {_GONE}.")
        return raw


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    lock = FileLock(destination.with_name(f".{destination.name}.lock"), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{lock.lock_file} was held for {LOCK_SECONDS} s; end the process that fetches it."
        ) from error
    try:
        yield
    finally:
        lock.release()


def object_path(sha256: str) -> str:
    """Where a file of this content lies."""
    return f"objects/{sha256[:2]}/{sha256}"


def artifact_path(digest: str) -> str:
    """Where an artifact's manifest lies."""
    return f"{ARTIFACTS}/{digest}.json"


def _partial(entry: FileEntry) -> str:
    """What of a file has come; no file of an artifact can be called so."""
    return f".{entry.sha256}"
