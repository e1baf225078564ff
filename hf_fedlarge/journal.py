"""What a run did, one JSON object a line: written, synced, and only then true.

A line is appended whole or not at all: what a kill or a full disk left of one is cut off when the journal is opened
or the write fails. Nothing is ever changed or removed. Reading it tells a server that starts again which clients were
asked, whose updates count, with which digests, and how many bytes went where.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_fedlarge.errors import ArtifactError, OutputError, os_problem

_INDEXED = ("round", "client")


class Journal:
    """The journal in one file; the run directory's lock keeps it to one writer.

    Attributes:
        entries: what it holds, oldest first; each has an `event`, and the `time` in UTC where it isn't an old one.

    Raises:
        ArtifactError: a whole line is not JSON, so the file was changed by something else.
        OutputError: it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(path, len(whole))
        self.entries: list[dict[str, Any]] = []
        # What is asked for each client of each round is looked for among few.
        self._by: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                entry["event"] + ""
                self._add(entry)
            except (ValueError, TypeError, KeyError) as error:
                raise ArtifactError(
                    f"{path} is damaged in line {number}; expected an event as JSON: restore it from a copy, or "
                    "begin again with another --output."
                ) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append an event; when this returns it is on the disk."""
        entry = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk takes what it can
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {os_problem(error) or error}.") from error
        self._add(entry)

    def _add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        for name in _INDEXED:
            self._by[name, entry.get(name)].append(entry)

    def find(self, *events: str, **fields: Any) -> list[dict[str, Any]]:
        """The entries of these events whose fields have these values, oldest first."""
        few = [self._by.get((name, fields[name]), []) for name in _INDEXED if name in fields]
        return [
            entry
            for entry in min(few, key=len, default=self.entries)
            if entry["event"] in events and all(entry.get(name) == value for name, value in fields.items())
        ]
