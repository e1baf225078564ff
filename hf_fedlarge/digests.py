"""SHA-256 of large files that stay as they are, remembered between processes.

A federation's server asks for its checkpoint's digest when it shrinks it, in every round's evaluation and when it
merges; reading a 7B model for that takes ten seconds, and minutes from a slow disk. So the digest of a file is kept in
the user's cache under all that the system says of it, as git's index does: path, device, inode, size, and when it was
written and changed to the nanosecond. Whoever can change a file and leave these as they were is the machine's owner.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from hf_fedlarge.artifacts import sha256_of
from hf_fedlarge.cache import cache_directory, is_own

_REMEMBERED_BYTES = 2**24  # smaller files are read again sooner than it pays to ask
_SETTLED_NS = 2 * 10**9  # times are as coarse as that on some disks: a file could change twice within one


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file, read only if it isn't known yet or the file was touched since. For files that are one's own.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as opened:  # which makes a network's file system ask for what it says next
        before = os.fstat(opened.fileno())
        if before.st_size < _REMEMBERED_BYTES:
            return sha256_of(path)
        kept = _kept(path, before)
        if known := _recalled(kept):
            return known
        found = sha256_of(path)
        after = os.fstat(opened.fileno())
        settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NS
        if settled and _kept(path, after) == kept:
            _remember(kept, found)
    return found


def _kept(path: Path, found: os.stat_result) -> Path | None:
    """Where the digest of a file in this state is, by all that tells one state from another; None: there is no home."""
    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    name = hashlib.sha256(repr((str(path.resolve()), *state)).encode()).hexdigest()[:32]
    with suppress(RuntimeError):
        return cache_directory() / "digests" / name
    return None


def _recalled(kept: Path | None) -> str | None:
    if kept is not None:
        with suppress(OSError, UnicodeDecodeError):
            known = kept.read_text("ascii")
            if is_own(kept) and re.fullmatch("[0-9a-f]{64}", known):
                return known
    return None


def _remember(kept: Path | None, digest: str) -> None:
    if kept is not None:
        with suppress(OSError):  # it is a cache
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f".{kept.name}.{os.getpid()}")
            partial.write_text(digest, "ascii")
            partial.replace(kept)
