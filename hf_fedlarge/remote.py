"""Files at any URL of fsspec: looked at before they are read, written whole, and nothing is waited for for ever.

A file is bounded by its size before it is read, and a file that someone else may have put there as a link or a pipe is
not followed (`directory.py`). What goes wrong in any file system is one error that names the place and what was asked.

Left out: credentials, which each fsspec library finds as it always does, in the environment or its own files; and a
bound on an answer that is longer than what was asked for, which fsspec reads to its end before anyone sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from hf_fedlarge.directory import Directory
from hf_fedlarge.errors import ArtifactError, ConfigError, StoreError

REQUEST_SECONDS = 600.0  # for an answer, with some megabytes or none
SLOWEST_BYTES = 2**14  # a second, of what is sent in one request
# Here an object appears when it is whole, and a rename would be another copy. Everywhere else files are renamed, in
# memory too, where one is seen as soon as it is opened.
_WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf"}


class RemoteFiles:
    """Files under a URL; opening it sends nothing, but for what connects at once.

    Args:
        url: of a directory, which need not exist yet.

    Raises:
        ConfigError: no file system of this name, the library that speaks to it is not installed, or what it connects to
            at once (`ftp`, `sftp`) is not there.
    """

    def __init__(self, url: str) -> None:
        try:
            self.fs, root = url_to_fs(url)
        except Exception as error:  # each library has its own
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(f"{url} can't be opened as a store: {said:.300}.") from error
        self.url, self._root = url.rstrip("/"), root.rstrip("/")
        if isinstance(self.fs, LocalFileSystem):
            self.fs = Directory(self._root)
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self._whole_at_once = bool(protocols & _WHOLE_AT_ONCE)

    def read(self, path: str, most_bytes: int) -> bytes | None:
        """A small file; None if there is none.

        Raises:
            ArtifactError: it is larger than `most_bytes`, or not a plain file.
            StoreError: the store can't be read.
        """
        size = self._size(path)
        if not size:  # S3 has no range of an empty file
            return None if size is None else b""
        if size <= most_bytes:
            try:
                # It may be replaced just now by a longer one, of which no more is read either.
                raw = self._call("cat_file", self._at(path), start=0, end=most_bytes + 1)
            except FileNotFoundError:
                return None
            size = len(raw)
        if size > most_bytes:
            raise ArtifactError(f"{self.url}/{path} has {size} bytes; expected at most {most_bytes}.")
        return raw

    def write(self, path: str, content: bytes) -> None:
        """Write a small file, which replaces an older one at once.

        Raises:
            StoreError: the store can't be written.
        """
        with self._appearing(path) as written:
            self._call("pipe_file", written, content)

    def names(self, path: str) -> list[str]:
        """What lies directly under `path`, sorted; nothing if it isn't there.

        Raises:
            StoreError: the store can't be read.
        """
        self.fs.invalidate_cache()
        try:
            listed = self._call("ls", self._at(path), detail=False)
        except FileNotFoundError:
            return []
        names = {str(each).rstrip("/").rpartition("/")[2] for each in listed}
        return sorted(name for name in names if not name.startswith("."))

    def share(self, path: str) -> None:
        """Make a folder in which may write who may in the one that it is in; nothing where folders needn't be made.

        Raises:
            StoreError: it can't be made.
        """
        if isinstance(self.fs, Directory):
            try:
                self._call("share", self._at(path))
            except (FileNotFoundError, ArtifactError) as error:
                raise StoreError(f"{self.url}/{path} can't be made: {error}") from error

    def remove(self, path: str) -> None:
        """Remove all there is under `path`.

        Raises:
            StoreError: the store can't be written.
        """
        try:
            self._call("rm", self._at(path), recursive=True)
        except FileNotFoundError:
            return

    def _size(self, path: str) -> int | None:
        """Bytes of a plain file; None if there is nothing.

        Raises:
            ArtifactError: a link, a pipe, a directory: what someone else may have put there to be followed or read.
        """
        self.fs.invalidate_cache()
        try:
            info = self._call("info", self._at(path))
        except FileNotFoundError:
            return None
        if info["type"] != "file" or info.get("islink"):
            raise ArtifactError(f"{self.url}/{path} is not a plain file; remove it.")
        return info["size"]

    def _upload(self, source: Path, path: str) -> None:
        seconds = REQUEST_SECONDS + source.stat().st_size // SLOWEST_BYTES
        with self._appearing(path) as written:
            self._call("put_file", str(source), written, seconds=seconds)

    @contextmanager
    def _appearing(self, path: str) -> Iterator[str]:
        """Where to write so that `path` appears when it is whole."""
        whole = self._at(path)
        parent, _, name = whole.rpartition("/")
        written = whole if self._whole_at_once else f"{parent}/.{name}.partial"
        try:
            if written != whole:
                self._call("makedirs", parent, exist_ok=True)
            yield written
            if written != whole:
                self._call("mv", written, whole)
        except FileNotFoundError as error:
            raise StoreError(f"{self.url} can't be written ({error}); make the bucket or directory first.") from error
        except ArtifactError as error:
            raise StoreError(f"{self.url}/{path} can't be written: {error}") from error

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _call(self, operation: str, *arguments: Any, seconds: float | None = None, **options: Any) -> Any:
        """Have the file system do something; each raises errors of its own, of which only one is told apart.

        Only those that speak to a network by themselves can be given up after `seconds`; a directory's mount has to.
        """
        seconds = seconds or REQUEST_SECONDS
        try:
            if isinstance(self.fs, AsyncFileSystem) and (coroutine := getattr(self.fs, f"_{operation}", None)):
                return sync(self.fs.loop, coroutine, *arguments, timeout=seconds, **options)
            return getattr(self.fs, operation)(*arguments, **options)
        except (FileNotFoundError, ArtifactError):
            raise
        except FSTimeoutError as error:
            raise StoreError(f"{self.url} did not answer within {seconds:g} s ({operation}).") from error
        except Exception as error:
            if isinstance(self.fs, Directory) and isinstance(error, OSError) and error.strerror:
                where = f" ({error.filename})" if error.filename else ""
                raise StoreError(
                    f"{self.url} failed: {error.strerror}{where}; check who may read and write there."
                ) from error
            said = " ".join(str(error).split()).rstrip(".")
            raise StoreError(
                f"{self.url} failed ({operation}: {type(error).__name__}{said and f': {said:.300}'}); check the "
                "network, the credentials and who may read and write there."
            ) from error
