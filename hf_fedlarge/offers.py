"""What the server puts into a store for the clients of a round, and takes out again when nobody can need it.

For each tier a package, the adapter that the round starts from, and what changed in it since the round before, for
those who have that one. A client that lost it says so and fetches the whole adapter, which is counted then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, file_entry, read_manifest
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.jobs import Jobs, Tier
from hf_fedlarge.orders import PACKAGE, WHOLE, Change, FailureDocument, Work, inbox, read_document
from hf_fedlarge.retention import discard
from hf_fedlarge.server import Order, RoundServer
from hf_fedlarge.store import Store, object_path


class Offers:
    """A run's offers.

    Args:
        store: where orders and adapters go.
        packages: another store, for packages; None: they lie with the orders.
    """

    def __init__(self, store: Store, packages: Store | None = None) -> None:
        self._store, self._package_store = store, packages or store
        self._packages: dict[Path, str] = {}
        self._forgotten: set[Path] = set()

    def work(self, jobs: Jobs, tier: Tier, clients: list[str], server: RoundServer) -> Work:
        """Put what a tier's clients need in a round into the stores.

        Raises:
            StoreError: a store can't be written.
        """
        if tier.package not in self._packages:  # read and checked once
            self._packages[tier.package] = self._package_store.put(tier.package)
        adapter = jobs.adapter(tier, server.number)
        files = read_manifest(adapter, AdapterManifest).files
        return Work(
            clients=clients,
            package=self._packages[tier.package],
            package_bytes=tier.manifest.total_bytes,
            package_store=None if self._package_store is self._store else self._package_store.url,
            adapter=self._store.put(adapter, leave_out=SERVER_FILES),
            adapter_bytes=sum(entry.size for name, entry in files.items() if name not in SERVER_FILES),
            update_bytes=jobs.upload_bytes(clients[0], server.number),
            change=self._change(jobs, tier, clients, server),
        )

    def _change(self, jobs: Jobs, tier: Tier, clients: list[str], server: RoundServer) -> Change | None:
        holders = [client for client in clients if jobs.is_offered(server.journal, client, server.number)]
        if not holders:
            return None
        directory, changed = jobs.changes(tier, server.number)
        for name, entry in changed.items():
            self._store.put_file(directory / name, entry)
        since = read_manifest(jobs.adapter(tier, server.number - 1), AdapterManifest).digest
        return Change(since=since, files=changed, clients=holders)

    def hear(self, jobs: Jobs, server: RoundServer, order: Order, client: str) -> None:
        """Count, once, what a client says it fetched beyond what is counted: a package again, all of an adapter.

        Raises:
            ArtifactError: it says it in another form.
            StoreError: the store can't be read.
        """
        place = inbox(order.round, client, order.attempt)
        had = jobs.last_asked(server.journal, client, order.round)  # None: the package is counted as it was asked
        if had is not None and read_document(self._store, f"{place}/{PACKAGE}", FailureDocument):
            size = jobs.tier_of(client, order.round).manifest.total_bytes
            server.told(order, client, "down", "package", size)
        if not jobs.is_offered(server.journal, client, server.number):
            return
        if read_document(self._store, f"{place}/{WHOLE}", FailureDocument):
            server.told(order, client, "down", "adapter", jobs.whole_bytes(client, order.round))

    def forget(self, run: Path, number: int, say: Callable[[str], None]) -> None:
        """Remove what clients of rounds before the last one started from.

        Some client of the last round may just be fetching its adapter; the server itself has all in the run directory.
        """
        for past in range(number - 2):  # whose adapters were for the rounds after them
            home = run / "rounds" / f"{past:04d}"
            for adapter in [home / "adapter", *sorted(home.glob("tiers/*"))]:
                if adapter in self._forgotten:
                    continue
                try:
                    discard(self._store, read_manifest(adapter, AdapterManifest))
                except ArtifactError as error:  # not a reason to end a federation
                    say(f"{adapter} stays in the store: {error}")
                self._forgotten.add(adapter)
            for change in set(home.glob("changes/*/*.safetensors")) - self._forgotten:
                self._store.remove(object_path(file_entry(change).sha256))
                self._forgotten.add(change)
