"""What no client can need any more leaves the store: artifacts of old rounds, with the files that nothing else has.

Objects lie by content, so one file may belong to several artifacts, also to those of another federation that was served
in the same place: a file is removed only if no other manifest in the store lists it. Files go first and their manifest
last, so that what a kill or a failing store left is removed by the next call. A client that is just fetching such an
artifact gets a `StoreError` that says so, and takes the next order.
"""

from __future__ import annotations

from contextlib import suppress

from hf_fedlarge.artifacts import MAX_MANIFEST_BYTES, Manifest
from hf_fedlarge.errors import ArtifactError, StoreError
from hf_fedlarge.store import ARTIFACTS, Store, artifact_path, object_path
from hf_fedlarge.untrusted import parse_json

_NAMED = 5  # of what can't be removed, in a line


def discard(store: Store, manifest: Manifest) -> None:
    """Remove an artifact and those of its files that no other artifact in the store has; nothing if it isn't there.

    What is removed says the caller's own copy of the manifest: one in the store might name anything. Nobody may put
    artifacts into the store meanwhile.

    Raises:
        ArtifactError: some manifest in the store can't be read, so that nobody knows what it needs; nothing is removed.
        StoreError: the store can't be read or written.
    """
    path = artifact_path(manifest.digest)
    names = [f"{ARTIFACTS}/{name}" for name in store.names(ARTIFACTS)]
    if path not in names:
        return
    needed = set().union(*(_files(store, other) for other in names if other != path))
    for sha256 in sorted({entry.sha256 for entry in manifest.files.values()} - needed):
        store.remove(object_path(sha256))
    store.remove(path)


def clear(store: Store, home: str, before: int) -> None:
    """Remove what came or was said in rounds before one, each of which has a folder of its number in `home`.

    Raises:
        StoreError: the store can't be read, or some of it can't be removed: the message names that, all else is gone.
    """
    stuck: dict[str, StoreError] = {}
    for name in store.names(home):
        if name.isdecimal() and int(name) < before:
            stuck |= _stuck(store, f"{home}/{name}")
    if not stuck:
        return
    first = next(iter(stuck.values()))
    cause = first.__cause__ or first
    more = f" and {len(stuck) - _NAMED} more" if len(stuck) > _NAMED else ""
    raise StoreError(
        f"{store.url} keeps {', '.join(list(stuck)[:_NAMED])}{more}, of rounds that are over "
        f"({type(cause).__name__}: {cause}): remove that by hand, and in a shared directory have its clients send in "
        "the server's group with umask 007 (docs/deployment.md)."
    ) from first


def _stuck(store: Store, folder: str) -> dict[str, StoreError]:
    """Remove a folder; returns what of it can't be removed: some clients', if the others' can."""
    try:
        store.remove(folder)
        return {}
    except StoreError as error:
        stuck = {}
        with suppress(StoreError):  # of looking into it
            for name in store.names(folder):
                try:
                    store.remove(f"{folder}/{name}")
                except StoreError as of_one:
                    stuck[f"{folder}/{name}"] = of_one
        return stuck or {folder: error}


def _files(store: Store, path: str) -> set[str]:
    """The SHA-256 of what a manifest lists."""
    raw = store.read(path, MAX_MANIFEST_BYTES)
    if raw is None:
        return set()
    try:
        return {entry["sha256"] for entry in parse_json(raw, f"{store.url}/{path}")["files"].values()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{store.url}/{path} is no manifest; nothing is removed until it is gone.") from error
