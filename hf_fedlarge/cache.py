"""What one user's processes keep for each other."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where it is; it need not exist.

    Raises:
        RuntimeError: there is no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_fedlarge"


def is_own(path: Path) -> bool:
    """Whether a file there is this user's; nobody else's is believed.

    Raises:
        OSError: it isn't there.
    """
    return path.stat().st_uid == os.getuid()
