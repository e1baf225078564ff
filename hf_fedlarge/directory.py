"""A directory that others can write, too: fsspec's local file system, following no link and awaiting no pipe.

Whoever may write into a directory can put a link or a pipe where a file was looked at, or is to be made, a moment ago.
So each file is opened from the root on, folder by folder and none of them a link, is looked at once it is open, and is
made only where nothing is.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from hf_fedlarge.errors import ArtifactError

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class Directory(LocalFileSystem):
    """The files under a directory, each by its whole path. The directory itself may be reached by a link.

    What isn't a plain file, or lies behind a link, is an `ArtifactError`.
    """

    cachable = False

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = root

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        os.makedirs(self._root or "/", exist_ok=True)
        with self._entered(f"{path}/.", make=True):
            pass

    def share(self, path: str) -> None:
        """Make a folder in which may write who may in the one that it is in, whatever the umask."""
        self.makedirs(path, exist_ok=True)
        with self._entered(path) as (above, name):
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            try:
                wanted, found = (stat.S_IMODE(os.fstat(each).st_mode) for each in (above, folder))
                if found != wanted:
                    os.fchmod(folder, wanted)
            finally:
                os.close(folder)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Some bytes of a file, or all."""
        with self._entered(path) as (folder, name):
            try:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
                    raise ArtifactError(f"{path} is not a plain file; remove it.") from error
                raise
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise ArtifactError(f"{path} is not a plain file; remove it.")
                with open(file, "rb", closefd=False) as opened:
                    opened.seek(start or 0)
                    return opened.read(-1 if end is None else end - (start or 0))
            finally:
                os.close(file)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        """Write a file anew."""
        with self._made(path) as file:
            file.write(value)

    def put_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy a file from anywhere."""
        with open(path1, "rb") as source, self._made(path2) as file:
            shutil.copyfileobj(source, file, 2**20)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        """Rename a file in its folder; what has the name is replaced, be it a link."""
        with self._entered(path1) as (folder, name):
            os.replace(name, path2.rpartition("/")[2], src_dir_fd=folder, dst_dir_fd=folder)

    @contextmanager
    def _made(self, path: str) -> Iterator[BinaryIO]:
        with self._entered(path) as (folder, name):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)  # what a killed process left, or somebody's link
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(name, flags, 0o666, dir_fd=folder), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave a name without its bytes

    @contextmanager
    def _entered(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder that a path is in, which may be made, and the path's name there."""
        *folders, name = path.removeprefix(self._root).lstrip("/").split("/")
        here = os.open(self._root or "/", os.O_PATH | os.O_DIRECTORY)
        try:
            for folder in folders:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=here)
                try:
                    below = os.open(folder, _FOLDER, dir_fd=here)
                except NotADirectoryError as error:
                    raise ArtifactError(f"{path} is behind {folder}, which is no directory; remove that.") from error
                os.close(here)
                here = below
            yield here, name
        finally:
            os.close(here)
