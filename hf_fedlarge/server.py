"""A round on the server: a state machine, selected → received → validated → aggregated → evaluated → committed.

Every step is an entry of the run's journal, and what it made is whole before the entry is written. A server that was
killed takes up the round where the journal ends: an accepted update counts and is not asked for again, a refused one
stays refused, a client that did not answer is not asked twice. What a step would do again it does with the same bytes.

    rounds/.0001.work/CLIENT/     an update, as it was received
    rounds/.0001.work/.round/     the aggregated adapter, then the round's record
    rounds/0001/                  the same directory, renamed: the round is committed
    rounds/.late/0001/CLIENT/     an update that came too late for its round, and is kept for a later one

A round whose valid updates are fewer than `min_updates` is abandoned: the state stays what it was. The next attempt
draws other clients; the updates that were accepted count there. So is one whose adapter is broken, as its loss shows;
of the updates that it was made of none counts any more.

Nothing here knows how clients are reached. Whoever does asks `open` for the order, hands over with `receive` what
comes and with `fail` what doesn't, and then calls `close`.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hf_fedlarge.artifacts import (
    AdapterManifest,
    UpdateManifest,
    commit_directory,
    read_manifest,
    staged_directory,
    verify_files,
    write_json,
)
from hf_fedlarge.config import ATTEMPT_SETTINGS, FederationConfig
from hf_fedlarge.errors import ArtifactError, UpdateRefusedError
from hf_fedlarge.experience import as_begun, late_updates, said_by, seen
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import SIGNATURE_NAME, read_signature
from hf_fedlarge.ledger import Draw
from hf_fedlarge.plan import CheckIn, sample_cohort, who_can
from hf_fedlarge.report import broken_by
from hf_fedlarge.update import read_update

_STAGING = ".round"  # no client can be called so


@dataclass(frozen=True)
class Order:
    """An open round: the clients to ask, in this order, and how many valid updates end it."""

    round: int
    attempt: int
    clients: tuple[str, ...]
    goal: int


@dataclass(frozen=True)
class Receipt:
    """What became of an update: it counts, or why it doesn't. The same update handed over again gets the same."""

    client: str
    digest: str
    accepted: bool
    reason: str | None = None


class RoundServer:
    """One round of a run.

    Args:
        rounds: the run's directory of rounds.
        number: the round's.
        journal: the run's.
        config: what the round is selected and closed by; an attempt keeps what it was begun with (`settings`).
        validate: checks a client's update for a round and gives its manifest, or raises `UpdateRefusedError`.
    """

    def __init__(
        self,
        rounds: Path,
        number: int,
        journal: Journal,
        config: FederationConfig,
        validate: Callable[[int, str, Path], UpdateManifest],
    ) -> None:
        self.number, self.journal, self.config, self._validate = number, journal, config, validate
        self._rounds, self._late = rounds, rounds / ".late"
        self.committed = rounds / f"{number:04d}"
        self.work = rounds / f".{number:04d}.work"
        self.begin_wait(self.settings.deadline_seconds)
        # Whoever reaches the clients may have a thread for each: what is looked up and then written is one step.
        self._lock = threading.Lock()

    # Selected

    def open(self, check_ins: Sequence[CheckIn], needed_bytes: int = 0) -> Order:
        """Draw the clients, or take up the order of a server that was killed; it goes on with this one's deadline.

        Raises:
            ConfigError: too few clients can take part.
        """
        missing = [client for client in self.accepted if not (self.work / client).exists()]
        if missing or self._of("committed"):
            raise ArtifactError(
                f"{self.journal.path} says that round {self.number} "
                + (f"accepted {missing[0]}'s update" if missing else "was committed")
                + f", but {self.work / missing[0] if missing else self.committed} is missing; restore it from a copy, "
                "or begin again with another --output."
            )
        if not self.is_open and not self.accepted:
            shutil.rmtree(self.work, ignore_errors=True)  # masked for an attempt that was abandoned, or broke it
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.is_open:
            attempt, config = len(self._of("selected")) + 1, self.config
            cohort = sample_cohort(
                seen(check_ins, self.journal),
                config.cohort,
                # Chance protects clients only if nobody can foresee it. The journal keeps what was drawn.
                secrets.randbits(256) if config.privacy else config.seed,
                self.number,
                needed_bytes,
                selection=config.selection,
                spare=config.over_select,
                attempt=attempt,
            )
            goal = config.cohort or len(cohort)
            of = {"of": len(who_can(check_ins, needed_bytes))} if config.privacy else {}
            begun = config.model_dump(mode="json", include=ATTEMPT_SETTINGS)
            said = said_by(cohort, check_ins)
            self._write("selected", attempt=attempt, clients=cohort, said=said, goal=goal, **of, **begun)
            self.begin_wait(config.deadline_seconds)
        elif (seconds := self.config.deadline_seconds) != self.settings.deadline_seconds and not self._of("closed"):
            self._write("changed", attempt=self.last_order.attempt, deadline_seconds=seconds)
            self.begin_wait(seconds)
        return self.last_order

    @property
    def last_order(self) -> Order:
        """The round's last attempt, open or not."""
        last = self._of("selected")[-1]
        return Order(self.number, last["attempt"], tuple(last["clients"]), last["goal"])

    @property
    def settings(self) -> FederationConfig:
        """What the last attempt goes by: a server that is started again may be given others for the next."""
        return as_begun(self.config, self._of("selected", "changed"))

    @property
    def draw(self) -> Draw | None:
        """What chance had to do with the last attempt; None: there is no privacy to count it for.

        Nothing with secure aggregation, where attempts are drawn until one has enough clients that are there.
        """
        if not self.config.privacy:
            return None
        last = self._of("selected")[-1]
        return Draw(cohort=last["goal"], of=last["goal"] if self.config.secure else last["of"])

    def earlier(self, number: int) -> RoundServer:
        """An earlier round of the same run, for updates that come late."""
        return RoundServer(self._rounds, number, self.journal, self.config, self._validate)

    @property
    def keeping(self) -> RoundServer | None:
        """The round before, for which late updates are kept; None: there is none, or they are refused."""
        past = self.earlier(self.number - 1)
        return past if past.number and past.settings.late == "buffer" else None

    @property
    def is_open(self) -> bool:
        """Whether there is an order already, which was not abandoned."""
        entries = self._of("selected")
        return bool(entries) and not self._of("abandoned", attempt=entries[-1]["attempt"])

    def waiting(self, order: Order, overtime: bool = False) -> list[str]:
        """The clients to wait for: `unheard`, or none once the goal or, without `overtime`, the deadline is reached."""
        if len(self.accepted) >= order.goal or self._is_closed(order) or (self.is_late and not overtime):
            return []
        return self.unheard(order)

    def unheard(self, order: Order) -> list[str]:
        """The clients of an order that neither sent an update nor were given up."""
        heard = {entry["client"] for entry in self._of("validated", "failed", attempt=order.attempt)}
        return [client for client in order.clients if client not in heard | self.accepted.keys()]

    def begin_wait(self, seconds: float | None) -> None:
        """Have the deadline in so many seconds; None: there is none."""
        self._until = None if seconds is None else time.monotonic() + seconds

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline, which is counted from when this server took up the attempt; None: there is none."""
        return None if self._until is None else self._until - time.monotonic()

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.seconds_left is not None and self.seconds_left < 0

    def asked(self, client: str, down: int, tier: int = 0) -> None:
        """Write down that a client is sent `down` bytes for a `tier`; one that is asked again has them already."""
        with self._lock:
            if not self._of("asked", client=client):
                self._write("asked", client=client, bytes=down, tier=tier)

    # Received and validated

    @property
    def accepted(self) -> dict[str, str]:
        """Client → digest of its update, of those that count in this round."""
        entries = self._of("validated", accepted=True)
        # Masked updates are for one attempt, and those of a broken adapter would break the next one.
        over = [entry["attempt"] for entry in self._of("abandoned") if self.config.secure or entry.get("broken")]
        return {entry["client"]: entry["digest"] for entry in entries if entry["attempt"] > max(over, default=0)}

    def receive(self, order: Order, client: str, directory: Path, in_time: bool = False) -> Receipt:
        """Take a client's update and check it; what `directory` holds may be removed when this returns.

        Handing the same update over again changes nothing. A client's first valid update counts; another one from it
        is refused, and so is one that comes after the round was closed, or the deadline if it wasn't there `in_time`.
        Threads may call it, and take turns.
        """
        with self._lock:
            return self._receive(order, client, directory, in_time)

    def _receive(self, order: Order, client: str, directory: Path, in_time: bool) -> Receipt:
        home = self.work / client
        try:
            digest, signed = read_update(directory).digest, read_signature(directory)
        except (ArtifactError, OSError):
            digest, signed = "unreadable", None
        # The digest leaves the signature out, and an update that was refused for want of one may come again with it.
        signature = signed.signature if signed else None
        for entry in self._of("validated", client=client, digest=digest, signature=signature):
            if entry["attempt"] == order.attempt or (entry["accepted"] and self.accepted.get(client) == digest):
                return Receipt(client, digest, entry["accepted"], entry["reason"])
        reason, late = self._refusal(order, client), self._is_closed(order) or (self.is_late and not in_time)
        if reason is None and late and self.settings.late == "refuse":
            reason = f"{client} refused: its update came after round {self.number} was closed."
        if reason is None:
            try:
                manifest = self._validate(self.number, client, directory)
                kept = self._late / f"{self.number:04d}" / client if late else home
                if directory != kept:
                    # From here on it is our own copy that counts, and it is the one that was looked at.
                    with staged_directory(kept, overwrite=True) as staging:
                        shutil.copytree(directory, staging, dirs_exist_ok=True)
                        verify_files(staging, manifest, beside=SIGNATURE_NAME)
                        if read_update(staging).digest != manifest.digest:
                            raise ArtifactError("its manifest changed while it was looked at; send it again.")
            except UpdateRefusedError as error:
                reason = str(error)
            except ArtifactError as error:
                reason = f"{client} refused: {error}"
        size = sum(path.stat().st_size for path in directory.glob("*") if path.is_file())
        said = {} if reason else manifest.said
        if late and self.is_late:
            said["overdue"] = True
        if not self._of("received", client=client, digest=digest):
            self._write("received", client=client, digest=digest, bytes=size, **said)
        if reason is None and late:
            self._write("late", client=client, digest=digest)
            reason = f"{client} came after round {self.number} was closed; its update is kept for a later one."
        self._write(
            "validated",
            attempt=order.attempt,
            client=client,
            digest=digest,
            accepted=reason is None,
            reason=reason,
            **({"signature": signature} if signature else {}),
        )
        if reason is not None and directory == home:
            shutil.rmtree(home)  # so that the client can be asked again in another attempt
        return Receipt(client, digest, reason is None, reason)

    def fail(self, order: Order, client: str, reason: str) -> None:
        """Write down that a client gave no update."""
        with self._lock:
            self._write("failed", attempt=order.attempt, client=client, reason=reason)

    @property
    def refused(self) -> list[dict[str, str]]:
        """Who gave no update, or one that does not count, and why, in every attempt."""
        entries = [*self._of("failed"), *self._of("validated", accepted=False)]
        return [{"client": entry["client"], "reason": entry["reason"]} for entry in entries]

    def verdicts(self, order: Order) -> dict[str, str | None]:
        """Client → why what it sent in an attempt doesn't count; None: it does."""
        entries = self._of("validated", "failed", attempt=order.attempt)
        return {entry["client"]: entry["reason"] for entry in entries} | dict.fromkeys(
            entry["client"] for entry in entries if entry.get("accepted")
        )

    def _refusal(self, order: Order, client: str) -> str | None:
        """Why an update isn't even looked at."""
        if client in self.accepted:
            return f"{client} refused: it sent more than one update; the first counts."
        return None if client in order.clients else f"{client} refused: it was not asked in round {self.number}."

    def _is_closed(self, order: Order) -> bool:
        return bool(self._of("closed", attempt=order.attempt))

    # Aggregated, evaluated, committed

    def close(
        self,
        order: Order,
        aggregate: Callable[[list[Path], dict[Path, int], Path], object],
        evaluate: Callable[[Path], dict[str, float]],
        describe: Callable[[AdapterManifest, list[Path]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Aggregate what was accepted, evaluate, commit; returns the round's record.

        Args:
            order: the open round.
            aggregate: makes an adapter directory of update directories, which come in the order of clients' names, and
                of late ones with the round they were for.
            evaluate: the losses of an adapter directory; one that isn't finite says that it is broken.
            describe: what the record says besides, of the adapter and the updates.

        Raises:
            UpdateRefusedError: too few updates count, or what they make is broken; the round is abandoned.
        """
        if not self._of("closed", attempt=order.attempt):
            needed = max(self.settings.min_updates, self.config.fewest_updates)
            if len(self.accepted) < needed:
                found = f"{len(self.accepted)} of {len(order.clients)} clients sent a valid update"
                self.abandon(order, f"{found}; at least {needed} are needed.")
            late = late_updates(self.journal, self.number, self.accepted)
            self._write("closed", attempt=order.attempt, clients=self.accepted, late=late)
        [closed] = self._of("closed", attempt=order.attempt)
        updates = [self.work / client for client in sorted(closed["clients"])]
        late = {self._late / f"{number:04d}" / client: number for number, client in closed["late"]}
        staging = self.work / _STAGING
        staging.mkdir(exist_ok=True)
        adapter = staging / "adapter"
        if not adapter.exists():
            aggregate(updates, late, adapter)
        manifest = read_manifest(adapter, AdapterManifest)
        if not self._of("aggregated", adapter=manifest.digest):
            self._write("aggregated", adapter=manifest.digest)
        if not self._of("evaluated"):
            losses = evaluate(adapter)
            if why := broken_by(losses, [*updates, *late]):
                self.abandon(order, why, broken=True)
            self._write("evaluated", losses=losses)
        losses = self._of("evaluated")[0]["losses"]
        record = {"round": self.number, **losses, **describe(manifest, updates), "refused": self.refused}
        write_json(staging / "round.json", record)
        commit_directory(staging, self.committed)
        self.finish()
        return record

    def abandon(self, order: Order, why: str, *, broken: bool = False) -> NoReturn:
        """End the attempt without a result, or a `broken` one; the run's state is what it was.

        Raises:
            UpdateRefusedError: always, with the reasons.
        """
        self._write("abandoned", attempt=order.attempt, accepted=self.accepted, broken=broken)
        refused = [(entry["client"], entry["reason"]) for entry in self.refused]
        causes = [reason if reason.startswith(client) else f"{client}: {reason}" for client, reason in refused]
        raise UpdateRefusedError(f"Round {self.number} is abandoned: {' '.join([why, *causes])}")

    # Stages of secure aggregation

    def staged(self, order: Order, stage: str, **found: Any) -> None:
        """Write down that a stage of the attempt is over, and what it found, which goes on to hold."""
        self._write("staged", attempt=order.attempt, stage=stage, found=found)

    def stage(self, order: Order, stage: str) -> dict[str, Any] | None:
        """What a stage found; None: it isn't over."""
        return next((entry["found"] for entry in self._of("staged", attempt=order.attempt, stage=stage)), None)

    def told(self, order: Order, client: str, way: str, what: str, size: int) -> None:
        """Write down a message beside updates, once: `up` from a client or `down` to it, in bytes."""
        about = {"attempt": order.attempt, "client": client, "way": way, "what": what}
        if not self._of("told", **about):
            self._write("told", **about, bytes=size)

    def finish(self) -> None:
        """Write down that the round is committed, and remove what it was made of."""
        if not self._of("committed"):
            self._write("committed", adapter=read_manifest(self.committed / "adapter", AdapterManifest).digest)
        shutil.rmtree(self.work, ignore_errors=True)
        for number, client in (late for closed in self._of("closed") for late in closed["late"]):
            shutil.rmtree(self._late / f"{number:04d}" / client, ignore_errors=True)

    def _of(self, *events: str, **fields: Any) -> list[dict[str, Any]]:
        return self.journal.find(*events, round=self.number, **fields)

    def _write(self, event: str, **fields: Any) -> None:
        self.journal.write(event, round=self.number, **fields)
