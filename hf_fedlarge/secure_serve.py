"""A round of secure aggregation on the server: the stages of `secagg.py`, each under an order of its own.

    keys     who has trained advertises keys; the round's deadline is for this
    shares   `stage_seconds` each from here on: every client's shares, which are passed on
    masked   the updates, as in any other round
    agree    where all of them signed their keys, signatures of who the survivors are, until they are enough
    reveal   shares of the survivors, until they are enough; the sum is left in `secure_sum.SUM`

What a stage found is in the journal before the next one's order is published, so a server that was killed asks again
for what it asked before and for nothing else: in no attempt are there two lists of survivors. Clients that don't answer
in time are left out; with too few the attempt is abandoned, and what came of it is of no use to anybody.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hf_fedlarge import secagg
from hf_fedlarge.agreement import Agreed, Agreement, check_agreed, is_signed, quorum
from hf_fedlarge.artifacts import staged_directory, write_json
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.fixed_point import mean_of
from hf_fedlarge.jobs import Jobs
from hf_fedlarge.keys import read_allowed
from hf_fedlarge.orders import (
    AGREED,
    AGREEMENT,
    CLIENT_BYTES,
    KEYS,
    MAX_NOTE_BYTES,
    REVEALED,
    ROSTER,
    SHARES,
    SecureOrder,
    Stage,
    as_bytes,
    boxes_name,
    inbox,
    read_document,
    secure,
    write_document,
)
from hf_fedlarge.records import Record
from hf_fedlarge.secure_sum import SUM, read_words
from hf_fedlarge.server import Order, RoundServer
from hf_fedlarge.update import MASKED_WORDS, read_update

if TYPE_CHECKING:
    from hf_fedlarge.serve import StoreClients

MessageT = TypeVar("MessageT", bound=Record)
Answers = Iterator[tuple[str, str | None]]


class SecureRound:
    """One attempt at a round.

    Args:
        clients: what reaches them.
        config: the federation, with `secure`.
        jobs: what each client gets.
        server: the round.
        order: the attempt.
    """

    def __init__(
        self, clients: StoreClients, config: FederationConfig, jobs: Jobs, server: RoundServer, order: Order
    ) -> None:
        self._clients, self._store, self._patience, self._config = clients, clients.store, clients.patience, config
        self._jobs, self._server, self._order = jobs, server, order
        self._home = (server.work / SUM).parent
        self._place = secure(order.round, order.attempt)
        self._least = server.settings.min_updates

    def answers(self) -> Answers:
        """All stages; as `clients.Clients.answers` yields.

        Raises:
            UpdateRefusedError: too few clients came through a stage, or what they sent gives no sum: the attempt is
                abandoned.
        """
        self._home.mkdir(exist_ok=True)
        yield from self._gather_keys()
        roster = self._roster()
        yield from self._pass_on_shares(roster)
        sharers = self._server.stage(self._order, "shares")["sharers"]
        yield from self._gather_updates(roster, sharers)
        survivors = self._server.stage(self._order, "masked")["survivors"]
        yield from self._agree(roster, sharers, survivors)
        yield from self._sum_up(roster, sharers, survivors)

    # The stages

    def _gather_keys(self) -> Answers:
        if self._server.stage(self._order, "keys"):
            return
        waiting = self._server.unheard(self._order)
        if not waiting:  # all of them failed before the server was killed
            self._need(waiting, max(2, self._least), "have trained and advertised keys")
        context = self._publish("keys", waiting)

        def check(client: str, keys: secagg.Keys) -> None:
            if keys.client != client:
                raise ArtifactError(f"they are in the name of {keys.client}.")
            secagg.check_keys(keys)
            if self._config.keys:
                secagg.check_signatures([keys], context, read_allowed(Path(self._config.keys)))

        found = yield from self._gather(waiting, KEYS, secagg.Keys, check, self._order.goal)
        # As many as are wanted, the first of the order where more came at once.
        chosen = sorted([client for client in self._order.clients if client in found][: self._order.goal])
        self._need(chosen, max(2, self._least), "have trained and advertised keys")
        threshold = secagg.threshold_of(self._config.secure.threshold, len(chosen))
        keys = [found[client] for client in chosen]
        roster = secagg.Roster(context=context, threshold=threshold, clients=keys)
        write_json(self._home / ROSTER, roster.model_dump(mode="json"))
        self._server.staged(self._order, "keys", roster=roster.digest, clients=chosen, threshold=threshold)

    def _pass_on_shares(self, roster: secagg.Roster) -> Answers:
        if self._server.stage(self._order, "shares"):
            return
        self._leave(ROSTER, roster)
        for client in roster.names:
            self._told(client, "down", ROSTER, roster)
        self._publish("shares", roster.names)

        def check(client: str, shares: secagg.Shares) -> None:
            secagg.check_shares(shares, roster)

        sent = yield from self._gather(roster.names, SHARES, secagg.Shares, check)
        self._need(sent, max(quorum(roster), self._least), "have shared their secrets")
        for client, boxes in secagg.delivered(sent).items():
            self._leave(boxes_name(client), boxes)
            self._told(client, "down", SHARES, boxes)
        self._server.staged(self._order, "shares", sharers=sorted(sent))

    def _gather_updates(self, roster: secagg.Roster, sharers: list[str]) -> Answers:
        if self._server.stage(self._order, "masked"):
            return
        self._publish("masked", sharers, sharers)
        since, late = time.monotonic(), False
        while not late:  # once more after the end, as in `_gather`
            late = self._server.is_late
            waiting = [client for client in self._server.waiting(self._order, overtime=True) if client in sharers]
            if not waiting:
                break
            heard = False
            for client in self._patience.look(self._clients.present, self._order, waiting) or []:
                came = self._patience.look(self._fetched, roster, client)
                if came is not None:
                    heard = True
                    yield client, came or None
            if heard:
                since = time.monotonic()
            elif not late:
                self._progress(waiting, sharers, "masked updates")
                self._patience.wait(since, waiting, self._server.seconds_left)
        survivors = sorted(self._server.accepted)
        self._need(survivors, max(quorum(roster), self._least), "have sent their masked updates")
        self._server.staged(self._order, "masked", survivors=survivors)

    def _agree(self, roster: secagg.Roster, sharers: list[str], survivors: list[str]) -> Answers:
        if self._server.stage(self._order, "agree") or not is_signed(roster):
            return
        self._publish("agree", survivors, sharers, survivors)

        def check(client: str, message: Agreed) -> None:
            if self._config.keys:
                allowed = read_allowed(Path(self._config.keys))
                check_agreed(client, message.signature, roster, sharers, survivors, allowed)

        found = yield from self._gather(survivors, AGREED, Agreed, check, quorum(roster))
        self._need(found, quorum(roster), "have signed who the survivors are")
        agreement = Agreement(signatures={client: message.signature for client, message in found.items()})
        self._leave(AGREEMENT, agreement)
        for client in survivors:
            self._told(client, "down", AGREEMENT, agreement)
        self._server.staged(self._order, "agree", signers=sorted(found))

    def _sum_up(self, roster: secagg.Roster, sharers: list[str], survivors: list[str]) -> Answers:
        if self._server.stage(self._order, "reveal"):
            return
        self._publish("reveal", survivors, sharers, survivors)

        def check(client: str, message: secagg.Revealed) -> None:
            secagg.check_revealed(message, sharers, survivors)

        messages = yield from self._gather(survivors, REVEALED, secagg.Revealed, check, roster.threshold)
        self._need(messages, roster.threshold, "have revealed their shares")
        try:
            secrets = secagg.recovered(roster, sharers, survivors, messages)
            total = read_words(self._server.work / survivors[0] / MASKED_WORDS)
            for client in survivors[1:]:
                np.add(total, read_words(self._server.work / client / MASKED_WORDS), out=total)
            secagg.remove_masks(total, roster, survivors, secrets)
            count, of, equal = len(survivors), len(roster.clients), self._config.weighting == "equal"
            mean = mean_of(total, self._config.secure.limit, of, count, equal=equal)
        except ArtifactError as error:
            self._server.abandon(self._order, str(error))
        if not (self._server.work / SUM).exists():
            with staged_directory(self._server.work / SUM) as staging:
                total.astype("<u4", copy=False).tofile(staging / MASKED_WORDS)
        lost = sorted(set(roster.names) - set(survivors))
        if mean.clipped:
            limit = self._config.secure.limit
            self._patience.say(
                f"round {self._order.round}: {mean.clipped} numbers of all clients' were beyond ± {limit}"
            )
        self._server.staged(self._order, "reveal", clients=count, of=of, lost=lost, clipped=mean.clipped)

    # What they are made of

    def _publish(self, stage: Stage, asked: list[str], sharers: list[str] = (), survivors: list[str] = ()) -> str:
        """Order a stage of those who are asked in it; all but the first have a deadline of their own.

        Returns:
            What the order's attempt is called.
        """
        if stage != "keys":
            self._server.begin_wait(self._config.secure.stage_seconds)
        weighting = self._config.weighting
        keys = self._server.stage(self._order, "keys")
        most = max(getattr(self._jobs.asked(client, self._order.round), weighting, 1) for client in self._order.clients)
        said = SecureOrder(
            stage=stage,
            limit=self._config.secure.limit,
            weighting=weighting,
            most=most,
            roster=keys["roster"] if keys else None,
            sharers=list(sharers),
            survivors=list(survivors),
        )
        return self._clients.publish(self._jobs, self._server, self._order, asked, said).context

    def _gather(
        self,
        clients: list[str],
        name: str,
        kind: type[MessageT],
        check: Callable[[str, MessageT], None],
        enough: int | None = None,
    ) -> Generator[tuple[str, str | None], None, dict[str, MessageT]]:
        """The messages of clients by their name, until all or enough are there or the time is over."""
        found: dict[str, MessageT] = {}
        since, late = time.monotonic(), False
        # Once more after the end: what came in the last moment lies in the store, and is read by whoever reads there.
        while len(found) < (enough or len(clients)) and not late:
            late = self._server.is_late
            failed = self._server.journal.find("failed", round=self._order.round, attempt=self._order.attempt)
            gone = {entry["client"] for entry in failed} | found.keys()
            waiting = [client for client in clients if client not in gone]
            if not waiting:
                break
            heard = False
            for client in self._patience.look(self._clients.present, self._order, waiting) or []:
                came = self._patience.look(self._message, client, name, kind, check)
                if isinstance(came, str):
                    yield client, came
                elif came is not None:
                    found[client] = came
                    self._told(client, "up", name, came)
                heard = heard or came is not None
            if heard:
                since = time.monotonic()
            elif not late:
                self._progress(waiting, clients, name)
                self._patience.wait(since, waiting, self._server.seconds_left)
        return found

    def _progress(self, waiting: list[str], clients: list[str], what: str) -> None:
        line = f"round {self._order.round}: {len(clients) - len(waiting)} of {len(clients)} clients sent {what}"
        self._patience.progress(line, waiting)

    def _message(
        self, client: str, name: str, kind: type[MessageT], check: Callable[[str, MessageT], None]
    ) -> MessageT | str | None:
        """A client's message, or why there will be none; None: it isn't there yet."""
        place = inbox(self._order.round, client, self._order.attempt)
        try:
            if name == KEYS:  # the first answer, before which the adapter was fetched
                self._clients.hear(self._jobs, self._server, self._order, client)
            if failure := self._clients.failure(place):
                return failure
            most = MAX_NOTE_BYTES + CLIENT_BYTES * len(self._order.clients)
            message = read_document(self._store, f"{place}/{name}", kind, most)
            if message is not None:
                check(client, message)
            return message
        except ArtifactError as error:
            return f"{client} refused: {error}"

    def _fetched(self, roster: secagg.Roster, client: str) -> str | None:
        """As `StoreClients.fetched`, of an update that is masked for this roster."""
        update = self._server.work / client
        came = self._clients.fetched(self._jobs, self._server, self._order, client, update)
        if came == "":
            try:
                if read_update(update).roster != roster.digest:
                    shutil.rmtree(update)
                    return f"{client} refused: its update is masked for others than this attempt's clients."
            except ArtifactError:
                pass  # validation will say why
        return came

    def _roster(self) -> secagg.Roster:
        roster = secagg.Roster.model_validate(json.loads((self._home / ROSTER).read_text()))
        assert roster.digest == self._server.stage(self._order, "keys")["roster"]
        return roster

    def _leave(self, name: str, document: Record) -> None:
        self._patience.insist(write_document, self._store, f"{self._place}/{name}", document)

    def _told(self, client: str, way: str, what: str, message: Record) -> None:
        self._server.told(self._order, client, way, what, len(as_bytes(message)))

    def _need(self, came: object, least: int, what: str) -> None:
        if len(came) < least:
            self._server.abandon(self._order, f"{len(came)} clients {what}; at least {least} are needed.")
