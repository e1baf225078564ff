"""What can go wrong, by whom it can be mended.

Every error a user can cause derives from `FedLargeError`, whose message is one sentence: what was looked at, what was
found, what was expected, what to do. The command line prints that sentence and exits with 2. A leaf also inherits the
standard exception that callers of a library would expect. Our own bugs are `assert`s, not one of these.
"""

import errno


class FedLargeError(Exception):
    """Root of every error that a user or a client can cause."""


class ConfigError(FedLargeError, ValueError):
    """An option, or a value in a federation file, is wrong."""


class ArtifactError(FedLargeError, ValueError):
    """A directory is not the artifact it should be: missing, of another kind, damaged, or of another parent."""


class ArchitectureError(FedLargeError, ValueError):
    """The model is of a kind that can't be shrunk, streamed or merged."""


class DataError(FedLargeError, ValueError):
    """Training or evaluation data can't be read or has no usable column."""


class UpdateRefusedError(FedLargeError, ValueError):
    """A client's update failed validation; the message names the client and the cause."""


class BudgetError(FedLargeError, ValueError):
    """What is planned would take more bytes than the run may."""


class MemoryFullError(FedLargeError, MemoryError):
    """The machine, or its GPU, has no memory left for what was asked of it."""


class OutputError(FedLargeError, OSError):
    """The output exists already, can't be written, or the disk is full."""


class HubError(FedLargeError, RuntimeError):
    """The Hugging Face Hub refused, or can't be reached."""


class StoreError(FedLargeError, RuntimeError):
    """A store can't be reached, refuses, or lacks what it should have by now; trying again later may help."""


def os_problem(error: OSError) -> str | None:
    """What a user can mend of an operating system's error, in words; None for any other."""
    return _REASONS.get(error.errno)


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENOTDIR: "a parent of it is a file, not a directory",
    errno.EEXIST: "a file is where a directory has to be",
}
