"""A client's side of secure aggregation (`secagg.py`): what it answers in each stage, and what it answers only once.

An update is trained as always and stays here; what is sent is its change, masked. The secrets of an attempt lie beside
it until the last stage is answered, readable by their owner alone, so that a client that was killed goes on. With them
is what it was asked before: a client doesn't mask a second vector in an attempt, nor sign another list of survivors or
reveal shares for it, whoever asks. Where it has everybody's keys, enough of them must have signed that list before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hf_fedlarge import secagg
from hf_fedlarge.agreement import Agreement, agreed, check_agreement
from hf_fedlarge.artifacts import UpdateManifest, read_manifest, write_json
from hf_fedlarge.ciphers import check_that_secrets_can_be_shared
from hf_fedlarge.config import ClientName
from hf_fedlarge.entries import Digest
from hf_fedlarge.errors import ArtifactError, StoreError
from hf_fedlarge.keys import read_allowed, read_key
from hf_fedlarge.orders import (
    AGREED,
    AGREEMENT,
    KEYS,
    MAX_ORDER_BYTES,
    REVEALED,
    ROSTER,
    SHARES,
    OrderDocument,
    Work,
    as_bytes,
    boxes_name,
    inbox,
    read_document,
    secure,
    write_document,
)
from hf_fedlarge.records import Record
from hf_fedlarge.secure_sum import mask_update
from hf_fedlarge.store import Store
from hf_fedlarge.untrusted import read_json

NeededT = TypeVar("NeededT", bound=Record)


class _Attempt(Record):
    """What a client keeps of an attempt: its name, its secrets and which update they are for, and what it answered.

    The secrets go once shares are revealed, which may have to be sent again.
    """

    context: str
    secrets: secagg.Secrets | None
    update: Digest
    roster: Digest | None = None
    sharers: list[ClientName] | None = None
    survivors: list[ClientName] | None = None
    revealed: secagg.Revealed | None = None


class SecureMember:
    """A client in rounds of secure aggregation.

    Args:
        store: where the server is met.
        order_now: gives what the server asks for now, checked as every order is.
        client: its name.
        key: the file of its private key, which signs what it sends; None: that isn't signed.
        keys: the list of everybody's keys, which must have signed theirs; None: the server is believed.
        report: told of each step in a line.
    """

    def __init__(
        self,
        store: Store,
        order_now: Callable[[], OrderDocument | None],
        client: str,
        key: Path | None,
        keys: Path | None,
        report: Callable[[str], None],
    ) -> None:
        self._store, self._order_now, self._client, self._report = store, order_now, client, report
        self._key = read_key(key) if key else None
        self._keys = keys

    def answer(self, order: OrderDocument, work: Work, update: Path) -> None:
        """Do what a stage asks for.

        Args:
            order: the stage's.
            work: this client's.
            update: what it has trained, with the adapter that it started from beside it.

        Raises:
            ArtifactError: what the server says isn't what can be answered to; nothing is sent.
            StoreError: the store can't be reached.
        """
        check_that_secrets_can_be_shared()
        home = update.with_name("secure")
        home.mkdir(mode=0o700, exist_ok=True)
        path = home / f"{order.attempt}.json"
        digest = read_manifest(update, UpdateManifest).digest
        if order.secure.stage == "keys":
            self._advertise(order, path, digest)
            return
        if not path.exists():
            raise ArtifactError(f"{self._client} has no secrets for {order.context}, which it had keys advertised for.")
        attempt = _Attempt.model_validate(read_json(path, MAX_ORDER_BYTES))
        if attempt.update != digest:
            raise ArtifactError(f"{self._client}'s update is another one than when it advertised its keys.")
        if attempt.context != order.context:
            raise ArtifactError(f"{self._client} advertised keys for {attempt.context}, not for {order.context}.")
        if attempt.revealed:
            if order.secure.stage != "reveal" or order.secure.survivors != attempt.survivors:
                raise ArtifactError(f"{self._client} has revealed its shares in this attempt, for other survivors.")
            self._send(order, REVEALED, attempt.revealed)
            return
        roster = self._needed(order, ROSTER, secagg.Roster)
        if order.secure.roster != roster.digest:
            raise ArtifactError(f"{self._client} is shown another list of keys than the order is about.")
        allowed = read_allowed(self._keys) if self._keys else None
        secagg.check_roster(roster, self._client, attempt.secrets, order.context, allowed)
        attempt = self._once(path, attempt, roster=roster.digest)
        if order.secure.stage == "shares":
            self._send(order, SHARES, secagg.shared(attempt.secrets, roster, self._client))
            return
        boxes = self._needed(order, boxes_name(self._client), secagg.Shares).boxes
        if sorted(boxes) != order.secure.sharers:
            raise ArtifactError(f"{self._client} has shares of others than the order's sharers.")
        attempt = self._once(path, attempt, sharers=order.secure.sharers)
        opened = secagg.opened(attempt.secrets, roster, self._client, boxes)
        if order.secure.stage == "masked":
            self._send_masked(order, work, update, roster, attempt, home / "masked")
            return
        sharers, survivors = order.secure.sharers, order.secure.survivors
        answer = secagg.revealed(opened, roster, self._client, survivors)  # refuses lists that nothing is said to
        attempt = self._once(path, attempt, survivors=survivors)
        if order.secure.stage == "agree":
            if self._key is None:
                raise ArtifactError(f"{self._client} is asked to sign the survivors, and has no key: join with --key.")
            self._send(order, AGREED, agreed(self._client, self._key, roster, sharers, survivors))
            return
        if allowed:
            check_agreement(self._needed(order, AGREEMENT, Agreement), roster, sharers, survivors, allowed)
        # Shares that come after an attempt was given up would open a sum that nobody asks for any more.
        now = self._order_now()
        if now is None or now.step != order.step or not now.is_open:
            self._report(f"round {order.round}: the attempt was over before the shares were ready")
            return
        done = attempt.model_copy(update={"revealed": answer, "secrets": None})
        write_json(path, done.model_dump(mode="json"))
        self._send(order, REVEALED, answer)

    def _advertise(self, order: OrderDocument, path: Path, digest: str) -> None:
        attempt = _Attempt.model_validate(read_json(path, MAX_ORDER_BYTES)) if path.exists() else None
        # Of another attempt, or this one under other terms: nothing of it is gone on with.
        if attempt is None or attempt.secrets is None or (attempt.context, attempt.update) != (order.context, digest):
            for older in path.parent.glob("*.json"):
                older.unlink()
            attempt = _Attempt(context=order.context, secrets=secagg.new_secrets(), update=digest)
            write_json(path, attempt.model_dump(mode="json"))
        self._send(order, KEYS, secagg.advertised(self._client, attempt.secrets, order.context, self._key))

    def _send_masked(
        self, order: OrderDocument, work: Work, update: Path, roster: secagg.Roster, attempt: _Attempt, masked: Path
    ) -> None:
        mask_update(
            update,
            update.with_name("adapter"),
            masked,
            order.secure,
            len(roster.clients),
            roster.digest,
            lambda words: secagg.add_masks(words, attempt.secrets, roster, self._client, order.secure.sharers),
            self._key,
        )
        size = sum(path.stat().st_size for path in masked.iterdir())
        if size > work.update_bytes:
            raise ArtifactError(f"the masked update has {size} bytes; the order takes {work.update_bytes} at most")
        self._store.send(masked, self._place(order))
        self._report(f"round {order.round}: masked update sent, among {len(roster.clients)} clients")

    def _once(self, path: Path, attempt: _Attempt, **asked: object) -> _Attempt:
        """Write down what is answered to, before it is; another answer in the same attempt isn't given."""
        for name, value in asked.items():
            before = getattr(attempt, name)
            if before not in (None, value):
                raise ArtifactError(f"{self._client} was asked before with another {name} in this attempt.")
        attempt = attempt.model_copy(update=asked)
        write_json(path, attempt.model_dump(mode="json"))
        return attempt

    def _needed(self, order: OrderDocument, name: str, kind: type[NeededT]) -> NeededT:
        place = f"{secure(order.round, order.attempt)}/{name}"
        found = read_document(self._store, place, kind, MAX_ORDER_BYTES)
        if found is None:
            raise StoreError(f"{self._store.url}/{place} is not there, which the order is about.")
        return found

    def _send(self, order: OrderDocument, name: str, message: Record) -> None:
        write_document(self._store, f"{self._place(order)}/{name}", message)
        self._report(f"round {order.round}: {name.removesuffix('.json')} sent, {len(as_bytes(message))} bytes")

    def _place(self, order: OrderDocument) -> str:
        return inbox(order.round, self._client, order.attempt)
