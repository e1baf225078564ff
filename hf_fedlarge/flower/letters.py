"""Files of a store as the content of a Flower message, and back.

Each is an array of bytes under its path: Flower sends arrays in chunks, and one that two messages share only once.
"""

from __future__ import annotations

import math
import re

from flwr.app import Array, ArrayRecord, RecordDict

from hf_fedlarge.errors import ArtifactError

_FILES = "files"
_MOST_FILES = 16


def put_in(files: dict[str, bytes]) -> RecordDict:
    """A message's content with these files, by path."""
    arrays = {path: Array("uint8", (len(raw),), "file", raw) for path, raw in files.items()}
    return RecordDict({_FILES: ArrayRecord(arrays)})


def take_out(content: RecordDict, allowed: re.Pattern[str], most_bytes: float = math.inf) -> dict[str, bytes]:
    """The files in a message's content, by path; a content of nothing holds none.

    Args:
        content: what somebody sent.
        allowed: what every path has to match, whole.
        most_bytes: that the files may have together.

    Raises:
        ArtifactError: other files, or more.
    """
    if not content:
        return {}
    record = content.get(_FILES)
    if len(content) != 1 or not isinstance(record, ArrayRecord) or len(record) > _MOST_FILES:
        raise ArtifactError(f"its message holds something else than up to {_MOST_FILES} files.")
    files = {path: array.data for path, array in record.items()}
    for path in files:
        if not allowed.fullmatch(path):
            raise ArtifactError(f"its message holds a file {path!a:.200}, which nobody asked for.")
    total = sum(map(len, files.values()))
    if total > most_bytes:
        raise ArtifactError(f"its message has {total} bytes of files; expected {most_bytes} at most.")
    return files
