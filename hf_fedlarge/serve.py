"""A federation served over a store: nothing runs between the server and its clients but files that both can reach.

The rounds, their journal and their bytes are those of `rounds.py`; here is how clients on other machines are reached.
A round's order is published, updates are looked for in the inbox until the round has what it wants, and then the order
is closed. A server that was killed publishes the order again and goes on; what clients sent meanwhile is in the inbox.
`trainers/join.py` is the other side, and `docs/deployment.md` says who has to be able to write where.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fedlarge.admission import Admission
from hf_fedlarge.artifacts import UNPUBLISHED_FILES, AdapterManifest, UpdateManifest, read_manifest, write_json
from hf_fedlarge.ciphers import check_that_secrets_can_be_shared
from hf_fedlarge.clients import HELD_OUT, SERVED, write_check_ins
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.data import load_examples, write_jsonl
from hf_fedlarge.errors import ArtifactError, ConfigError, UpdateRefusedError
from hf_fedlarge.jobs import Down, Jobs
from hf_fedlarge.keys import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, PrivateKey, read_key
from hf_fedlarge.offers import Offers
from hf_fedlarge.orders import (
    CHECK_INS,
    FAILED,
    INBOX,
    ORDER,
    PATIENCE_SECONDS,
    SECURE,
    VERDICTS,
    FailureDocument,
    OrderDocument,
    Said,
    SecureOrder,
    VerdictDocument,
    Work,
    inbox,
    one_line,
    read_document,
    training_order,
    verdict,
    write_document,
)
from hf_fedlarge.patience import Patience
from hf_fedlarge.retention import clear
from hf_fedlarge.rounds import Report, drive
from hf_fedlarge.secure_serve import SecureRound
from hf_fedlarge.server import Order, RoundServer
from hf_fedlarge.store import Store
from hf_fedlarge.update import MAX_SMALL_BYTES
from hf_fedlarge.voice import signed

if TYPE_CHECKING:
    from hf_fedlarge.clients import Begin

logger = logging.getLogger(__name__)


def serve_federation(
    config: FederationConfig,
    run: Path,
    url: str,
    report: Report = logger.info,
    *,
    stop: bool = True,
    poll: float = 5.0,
    patience: float = PATIENCE_SECONDS,
    key: Path | None = None,
) -> dict[str, Any]:
    """Run a federation of clients that join over a store, or go on with one that was interrupted.

    Args:
        config: the federation; `eval_data` is what it is evaluated on, and `clients`, if given, who may join.
        run: the server's own directory, as `run_federation` makes it.
        url: the store's.
        report: told of each step in a line.
        stop: end with an error where two rounds in a row made the full model worse than the base.
        poll: seconds between two looks into the store.
        patience: seconds after which it ends where nobody checks in or, without a deadline, answers, or where the
            store can't be written.
        key: the file of the server's private key, which signs what it says to clients; None: it is not signed.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedLargeError: as `run_federation`, or a store that can't be written, or holds another federation.
    """
    clients = StoreClients(Store(url), report, poll, patience, key=read_key(key) if key else None)
    return drive(config, run, clients, report, stop=stop)


class StoreClients:
    """A run's clients, reached over a store (`clients.Clients` says what each method is for).

    Args:
        store: where orders are published and updates come in.
        report: told what is wrong with a check-in or the store, and who is waited for.
        poll: seconds between two looks into the store.
        patience: seconds after which waiting for clients, or for the store to be written, ends with an error.
        packages: another store, for packages; None: they lie with the orders.
        key: signs orders and verdicts; None: they are not signed.
    """

    simulated = False

    def __init__(
        self,
        store: Store,
        report: Report,
        poll: float,
        patience: float = PATIENCE_SECONDS,
        packages: Store | None = None,
        key: PrivateKey | None = None,
    ) -> None:
        self.store, self._report, self._key = store, report, key
        self.patience = Patience(report, poll, patience)
        self.down: Down = "offered"
        self._offers = Offers(store, packages)
        self._told: set[tuple[int, int, str]] = set()

    def check(self, config: FederationConfig, run: Path) -> None:
        """Look at the settings, the public examples and the store."""
        if config.eval_data is None:
            raise ConfigError("The federation has no eval_data; give it public examples that the server evaluates on.")
        if config.keys == "auto":
            raise ConfigError("keys: auto makes the keys of simulated clients; give the list that real ones are in.")
        if config.secure:
            check_that_secrets_can_be_shared()
        self._config, self._run = config, run
        training_order(config.training)  # what orders can't carry is refused now
        if not (run / SERVED).exists():
            if (run / HELD_OUT).exists():
                raise ConfigError(f"{run} was begun with simulated clients; choose another --output.")
            self._check_that_it_is_free("")
        if not (run / HELD_OUT).exists():
            self._examples = load_examples(config.eval_data)

    def prepare(self, config: FederationConfig, run: Path, begin: Begin) -> str | None:
        """Take the public examples, and the store for this run."""
        identity = run / SERVED
        if not identity.exists():
            self._check_that_it_is_free("")  # still
            begin(self._examples, None)
            # Of a former federation; the directories stay, which clients may not be allowed to make.
            for home in (CHECK_INS, INBOX, SECURE, VERDICTS):
                for name in self.store.names(home):
                    self.store.remove(f"{home}/{name}")
            write_json(identity, {"run": uuid.uuid4().hex})
        if not (run / HELD_OUT).exists():  # after the identity, without which it is a simulated run's
            write_jsonl(self._examples, run / HELD_OUT)
        self._id = json.loads(identity.read_text())["run"]
        found = self._check_that_it_is_free(self._id)
        if found is not None and found.run == self._id and found.signature is not None and self._key is None:
            raise ConfigError(
                f"{self.store.url}/{ORDER} is signed, and clients that know the key take no other; give --key, or "
                "remove that file there if they do."
            )
        if found is None or found.state == "over":
            self._close(0, 0)
        self._admission = Admission(self.store, self._id, self._key, self.patience.say)
        return None

    def _check_that_it_is_free(self, own: str) -> OrderDocument | None:
        found = read_document(self.store, ORDER, OrderDocument)
        if found is not None and found.run != own and found.state != "over":
            raise ConfigError(
                f"{self.store.url} serves another federation, whose {ORDER} is for its round {found.round}; choose "
                f"another --store, or remove {ORDER} there if that federation was given up."
            )
        return found

    def _close(self, number: int, attempt: int) -> None:
        self._announce(ORDER, OrderDocument(run=self._id, state="closed", round=number, attempt=attempt))

    def _announce(self, path: str, said: Said) -> None:
        write_document(self.store, path, signed(said, self._key))

    def check_in(self, jobs: Jobs, server: RoundServer) -> None:
        """Wait for as many as are wanted, but no longer than for updates if there are enough for a round."""
        if server.is_open:
            return  # what its clients said of themselves when they were drawn goes on to hold
        least = max(self._config.cohort or 1, self._config.min_updates, 2 if self._config.secure else 1)
        wanted = max(least, len(self._config.clients or ()) if self._config.cohort is None else 0)
        since = time.monotonic()
        until = since + (self._config.deadline_seconds or math.inf)
        while True:
            known = self.patience.look(self._admission.look, self._config.clients, jobs.least_bytes)
            able = [one for one in known or () if one.memory_bytes is None or one.memory_bytes >= jobs.least_bytes]
            enough = wanted if time.monotonic() < until else least
            if len(able) >= enough:
                break
            if known is not None:
                there = {one.client for one in known}
                missing = [client for client in self._config.clients or () if client not in there]
                line = f"waiting at {self.store.url}: {len(able)} of {enough} clients checked in"
                self.patience.progress(line, missing)
            self.patience.check(since, f"{wanted} clients to check in, of whom {len(able)} have")
            self.patience.sleep()
        write_check_ins(self._run, known)
        jobs.read_check_ins()

    def answers(
        self, jobs: Jobs, server: RoundServer, order: Order, asked: Callable[[str], None]
    ) -> Iterator[tuple[str, str | None]]:
        """Publish the order, and look into the inbox until the round has what it wants."""
        for home in (INBOX, SECURE):
            self.patience.look(clear, self.store, home, order.round - bool(server.keeping))
        self.patience.look(self._forget, order.round)
        self.patience.look(self.store.share, inbox(order.round))
        for client in server.waiting(order):
            if client not in (self._config.clients or order.clients):  # it was, when the attempt was begun
                yield client, f"{client} is no longer among the federation's clients"
        waiting = server.waiting(order, overtime=True)
        for client in waiting:
            asked(client)
        server.begin_wait(server.settings.deadline_seconds)  # nobody knows of the order yet
        try:
            if self._config.secure:
                yield from SecureRound(self, self._config, jobs, server, order).answers()
                self.patience.look(self._tell, server, order)
            else:
                yield from self._plain_answers(jobs, server, order, waiting)
        except UpdateRefusedError:  # the attempt is abandoned, and what was good in it does not count either
            self.patience.look(lambda: self._tell(server, order, refused=True))
            self.patience.insist(self._close, order.round, order.attempt)
            raise
        self.patience.insist(self._close, order.round, order.attempt)

    def _plain_answers(
        self, jobs: Jobs, server: RoundServer, order: Order, waiting: list[str]
    ) -> Iterator[tuple[str, str | None]]:
        if waiting:
            self.publish(jobs, server, order, waiting)
        since, late = time.monotonic(), False
        # Once more after the deadline: what came in the last moment lies in the inbox.
        while not late and (waiting := server.waiting(order, overtime=True)):
            late, heard = server.is_late, False
            for client in self.patience.look(self.present, order, waiting) or []:
                if client not in server.waiting(order, overtime=True):
                    continue
                update = server.work / client
                came = self.patience.look(self.fetched, jobs, server, order, client, update)
                if came is not None:
                    heard = True
                    yield client, came or None
            self.patience.look(self._tell, server, order)
            if past := server.keeping:
                self._take_late(jobs, past, server.work / ".late")
            if heard:
                since = time.monotonic()
            elif not late:
                if answered := len(order.clients) - len(waiting):
                    line = f"round {order.round}: {answered} of {len(order.clients)} clients answered"
                    self.patience.progress(line, waiting)
                self.patience.wait(since, waiting, server.seconds_left)
        self.patience.look(self._tell, server, order)

    def end(self, adapter: Path) -> None:
        """Tell the clients, and leave them what came of it, as it is published: with its carry."""
        digest = self.patience.insist(lambda: self.store.put(adapter, leave_out=UNPUBLISHED_FILES))
        number = read_manifest(adapter, AdapterManifest).round
        over = OrderDocument(run=self._id, state="over", round=number, attempt=0, adapter=digest)
        self.patience.insist(self._announce, ORDER, over)
        for home in (INBOX, SECURE):
            self.patience.look(clear, self.store, home, number + 1)
        self.patience.look(self._forget, number + 1)

    def publish(
        self, jobs: Jobs, server: RoundServer, order: Order, waiting: list[str], secure: SecureOrder | None = None
    ) -> OrderDocument:
        """Ask clients for what an order wants of them, or for a stage of it, in a document.

        What time is left for it counts from when all that the document names is in the store, and it can be written.
        """
        left = server.seconds_left
        work = self.patience.insist(self._work, jobs, server, order, waiting)

        def ask() -> OrderDocument:
            server.begin_wait(left)
            return self._publish(server, order, work, secure)

        return self.patience.insist(ask)

    def _work(self, jobs: Jobs, server: RoundServer, order: Order, waiting: list[str]) -> list[Work]:
        work = []
        for tier in jobs.tiers:
            clients = [client for client in waiting if jobs.tier_of(client, order.round) is tier]
            if clients:
                work.append(self._offers.work(jobs, tier, clients, server))
        return work

    def _publish(
        self, server: RoundServer, order: Order, work: list[Work], secure: SecureOrder | None
    ) -> OrderDocument:
        left = server.seconds_left
        document = OrderDocument(
            run=self._id,
            state="open",
            round=order.round,
            attempt=order.attempt,
            work=work,
            training=training_order(server.settings.training),
            seed=self._config.seed,
            proximal=self._config.proximal,
            eval_examples=self._config.client_eval_examples,
            codec=self._config.wire_codec,
            late=server.settings.late,
            closes_at=None if left is None else time.time() + left,
            secure=secure,
        )
        self._announce(ORDER, document)
        return document

    def present(self, order: Order, clients: list[str]) -> list[str]:
        """Those of the clients of whom there is something in the inbox."""
        there = set(self.store.names(inbox(order.round)))
        return [client for client in clients if client in there]

    def fetched(self, jobs: Jobs, server: RoundServer, order: Order, client: str, update: Path) -> str | None:
        """Fetch an update to `update`; None: it isn't there yet, or why there is none, or an empty string."""
        if update.exists():
            return ""  # fetched before the server was killed
        place = inbox(order.round, client, order.attempt)
        try:
            self.hear(jobs, server, order, client)
            if failure := self.failure(place):
                return failure
            most = jobs.upload_bytes(client, order.round)
            bounds = {"most_bytes": most, "manifest_bytes": MAX_SMALL_BYTES}
            bounds["beside"] = (SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
            found = self.store.fetch(place, update, UpdateManifest, **bounds)
        except ArtifactError as error:
            return f"{client} refused: {error}"
        return None if found is None else ""

    def hear(self, jobs: Jobs, server: RoundServer, order: Order, client: str) -> None:
        """`Offers.hear`."""
        self._offers.hear(jobs, server, order, client)

    def failure(self, place: str) -> str | None:
        """Why a client gives up, as it says in its inbox.

        Raises:
            ArtifactError: it says it in another form.
            StoreError: the store can't be read.
        """
        found = read_document(self.store, f"{place}/{FAILED}", FailureDocument)
        return None if found is None else one_line(found.reason)

    def _take_late(self, jobs: Jobs, server: RoundServer, home: Path) -> None:
        """Hand updates for the round before to it, which keeps them."""
        order = server.last_order
        for client in self.patience.look(self.present, order, server.unheard(order)) or []:
            came = self.patience.look(self.fetched, jobs, server, order, client, home / client)
            if came:
                server.fail(order, client, came)
            elif came is not None:
                self._report(f"  {server.receive(order, client, home / client).reason}")
                shutil.rmtree(home / client)
        self.patience.look(self._tell, server, order)

    def _tell(self, server: RoundServer, order: Order, *, refused: bool = False) -> None:
        """Leave each client that was heard in an attempt what became of its update, where it alone is meant to look."""
        for client, cause in server.verdicts(order).items():
            answer = (order.round, order.attempt, client)
            if answer in self._told or (refused and cause is None):
                continue
            if cause is not None:  # in which the server's own directories, and how it reaches the store, are no news
                cause = one_line(cause.replace(f"{self._run}/", "").replace(self.store.url, "the store"))
            said = VerdictDocument(run=self._id, client=client, round=order.round, attempt=order.attempt, cause=cause)
            self._announce(verdict(order.round, client, order.attempt), said)
            self._told.add(answer)

    def _forget(self, number: int) -> None:
        """Remove what clients of rounds before the last one started from, and what they were told."""
        clear(self.store, VERDICTS, number - 1)
        self._offers.forget(self._run, number, self.patience.say)
