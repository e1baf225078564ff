"""What a client fetches of adapters: what changed since the one that it has, where that is of use, or all of it; and in
the end what came of the federation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hf_fedlarge.artifacts import (
    SERVER_FILES,
    UNPUBLISHED_FILES,
    AdapterManifest,
    manifest_kind,
    read_manifest,
    sha256_of,
    verify_files,
)
from hf_fedlarge.errors import ArtifactError, OutputError, StoreError
from hf_fedlarge.orders import Change, OrderDocument, Work
from hf_fedlarge.store import Store
from hf_fedlarge.traffic import apply_change


def fetch_adapter(
    store: Store, work: Work, client: str, home: Path, adapter: Path, take_whole: Callable[[str], None]
) -> None:
    """Fetch what changed since the round before, if the work has that for this client, or the whole adapter.

    Args:
        store: where the adapter lies.
        work: what the client is asked for.
        client: its name.
        home: where its rounds are kept, and in them the adapters that it had.
        adapter: the directory to make.
        take_whole: is told why what changed is of no use, before the whole adapter is fetched.

    Raises:
        ArtifactError: what the store has is not what was announced.
        StoreError: the store can't be read.
    """
    change = work.change if work.change and client in work.change.clients else None

    def make(manifest: AdapterManifest, directory: Path) -> None:
        try:
            _apply(store, change, home, work.adapter_bytes, manifest, directory)
        except (ArtifactError, StoreError) as error:
            take_whole(str(error))

    bounds = {"most_bytes": work.adapter_bytes, "leave_out": SERVER_FILES}
    store.get(work.adapter, adapter, AdapterManifest, **bounds, local=make if change else None)


def check_result(result: Path) -> None:
    """Refuse a directory for the last adapter that has something else in it.

    Raises:
        OutputError: it has.
    """
    is_free = not result.exists() or (result.is_dir() and not any(result.iterdir()))
    if not (is_free or manifest_kind(result) == "adapter"):
        raise OutputError(f"{result} (--result) is there and is no adapter of hf-fedlarge; choose another directory.")


def fetch_result(store: Store, order: OrderDocument, result: Path, report: Callable[[str], None]) -> None:
    """Have the adapter that an order names as the federation's last at `result`, in place of an adapter there.

    Raises:
        ArtifactError: what the store has is not what the order names.
        StoreError: the store can't be read.
        OutputError: `result` is something else, or can't be written.
    """
    if order.adapter is None:
        report(f"{result} is not made: the order that ends the federation names no adapter")
        return
    check_result(result)
    store.get(order.adapter, result, AdapterManifest, leave_out=UNPUBLISHED_FILES)
    report(f"{result} is the federation's adapter, digest {order.adapter[:12]}")


def _apply(
    store: Store, change: Change, home: Path, most_bytes: int, manifest: AdapterManifest, directory: Path
) -> None:
    """Make in `directory` what files of an adapter can be made of the one before and of what changed.

    Raises:
        ArtifactError: the one before isn't here, or what was made isn't what it should be.
        StoreError: what changed can't be fetched.
    """
    previous, before = _previous(change, home)
    if sum(entry.size for entry in change.files.values()) > most_bytes:
        raise ArtifactError(f"what changed is announced as larger than the adapter's {most_bytes} bytes.")
    for name, entry in manifest.files.items():
        made = directory / name
        if name in SERVER_FILES or made.exists():
            continue
        if before.files.get(name) == entry:
            shutil.copyfile(previous / name, made)
        elif name in change.files:
            changed = directory / f".{change.files[name].sha256}"
            try:
                store.get_file(change.files[name], changed)
                apply_change(previous / name, changed, made)
            finally:  # what isn't in the manifest has no place in an adapter
                changed.unlink(missing_ok=True)
        else:
            continue
        if sha256_of(made) != entry.sha256:
            made.unlink()
            raise ArtifactError(f"{name} made of the one before and of what changed isn't what its manifest says.")


def _previous(change: Change, home: Path) -> tuple[Path, AdapterManifest]:
    for previous in sorted(home.glob("[0-9]*/adapter")):
        with suppress(ArtifactError):
            before = read_manifest(previous, AdapterManifest)
            if before.digest == change.since:
                verify_files(previous, before, unneeded=SERVER_FILES)
                return previous, before
    raise ArtifactError(f"the adapter {change.since[:12]}… of the round before is not here, or damaged.")
