"""What the server has seen of clients in earlier rounds, from the run's journal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hf_fedlarge.config import ATTEMPT_SETTINGS, FederationConfig
from hf_fedlarge.journal import Journal
from hf_fedlarge.plan import CheckIn


def seen(check_ins: Sequence[CheckIn], journal: Journal) -> list[CheckIn]:
    """The check-ins with what the server saw of each client in earlier rounds: its answers and its speed."""
    asked = Counter(entry["client"] for entry in journal.find("asked"))
    # Once a round: what broke an attempt counts no more, and its client may be asked again.
    valid = {(entry["round"], entry["client"]) for entry in journal.find("validated", accepted=True)}
    answered = Counter(client for _, client in valid)
    speed = {
        entry["client"]: entry["tokens"] / entry["seconds"]
        for entry in journal.find("received")
        if entry.get("tokens") and _is_measured(entry)
    }
    return [
        replace(
            check_in,
            asked=asked[check_in.client],
            answered=answered[check_in.client],
            tokens_per_second=speed.get(check_in.client, check_in.tokens_per_second),
        )
        for check_in in check_ins
    ]


def said_by(cohort: Sequence[str], check_ins: Sequence[CheckIn]) -> dict[str, dict[str, Any]]:
    """What each client of a cohort says of itself, as the journal keeps it (`Terms` reads it there)."""
    there = {check_in.client: check_in for check_in in check_ins}
    return {
        client: {"examples": there[client].examples, "memory_bytes": there[client].memory_bytes} for client in cohort
    }


def as_begun(config: FederationConfig, entries: Sequence[dict[str, Any]]) -> FederationConfig:
    """The settings with those of the last of a round's attempts, as far as the journal kept them.

    Args:
        config: the settings as they are now.
        entries: what attempts were begun with (`selected`), and what was changed while they were open (`changed`).
    """
    kept = {name: entry[name] for entry in entries for name in ATTEMPT_SETTINGS & entry.keys()}
    return config.model_copy(update=kept)


def late_updates(journal: Journal, number: int, accepted: Collection[str]) -> list[list[Any]]:
    """Round and client of the late updates of earlier rounds that can count in round `number`.

    Not those of clients whose update for this round was accepted.
    """
    used = [late for entry in journal.find("closed") for late in entry["late"]]
    # A server that was killed before it said so may have taken the update in time when it came back.
    said = {(entry["round"], entry["client"]) for entry in journal.find("validated", accepted=False)}
    in_time = {(entry["round"], entry["client"]) for entry in journal.find("validated", accepted=True)}
    kept = {(entry["round"], entry["client"]) for entry in journal.find("late")} & said - in_time
    return sorted(
        [past, client]
        for past, client in kept
        if past < number and client not in accepted and [past, client] not in used
    )


class Terms:
    """On what terms clients take part in each round: they hold for it, though a client be gone by now or say otherwise.

    Args:
        journal: the run's, which is read on from where it was read to.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._read = journal, 0
        self._said: dict[tuple[str, int], CheckIn] = {}
        self._tiers: dict[tuple[str, int], int | None] = {}
        self._deadlines: dict[int, float | None] = {}
        self._trainings: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def check_in(self, client: str, number: int) -> CheckIn | None:
        """What a client said when it was drawn for a round, in whichever attempt it said most examples.

        None: it was not drawn, or before the journal kept it.
        """
        self._read_on()
        return self._said.get((client, number))

    def tier(self, client: str, number: int) -> int | None:
        """The tier that a client was asked under; None: it was not asked, or before the journal kept it."""
        self._read_on()
        return self._tiers.get((client, number))

    def deadline(self, number: int, otherwise: float | None) -> float | None:
        """Of the last attempt at a round; `otherwise` before there is one, or before the journal kept it."""
        self._read_on()
        return self._deadlines.get(number, otherwise)

    def trainings(self, number: int) -> list[dict[str, Any]]:
        """The training arguments of a round's attempts, the last one's last, as far as the journal kept them."""
        self._read_on()
        return self._trainings.get(number, [])

    def _read_on(self) -> None:
        for entry in self._journal.entries[self._read :]:
            if entry["event"] == "asked":
                self._tiers[entry["client"], entry["round"]] = entry.get("tier")
            elif entry["event"] in ("selected", "changed"):
                if "deadline_seconds" in entry:
                    self._deadlines[entry["round"]] = entry["deadline_seconds"]
                if "training" in entry:
                    self._trainings[entry["round"]].append(entry["training"])
                for client, said in entry.get("said", {}).items():
                    before = self._said.get((client, entry["round"]))
                    examples = max(said["examples"], before.examples if before else 0)
                    self._said[client, entry["round"]] = CheckIn(client, examples, said["memory_bytes"])
        self._read = len(self._journal.entries)


class Past(NamedTuple):
    """How long a client took in the round `round`; where it `missed` the deadline, that is the least it can be."""

    round: int
    seconds: float
    missed: bool = False


def last_paces(journal: Journal, number: int, deadline: float) -> dict[str, Past]:
    """Client → how long it took the last time that is known, of what the journal had when round `number` began.

    Seconds are a client's word. A client that was asked, and gave neither an update nor a reason until a deadline had
    passed, took at least as long as that. What comes late, while round `number` runs, changes nothing any more.
    `deadline` is that of rounds from before the journal kept it.
    """
    deadlines: dict[int, float] = {}
    found: dict[str, Past] = {}
    asked, selected, waiting = set[str](), set[str](), set[str]()  # in a round, in an attempt, and not heard in that
    goal = 0
    for entry in journal.entries:
        at, event, client = entry.get("round", 0), entry["event"], entry.get("client")
        if at >= number:
            break
        if event == "selected":
            deadlines[at] = entry.get("deadline_seconds") or deadline
            asked = asked if entry["attempt"] > 1 else set()  # who is asked again has no entry of that
            selected, goal = set(entry["clients"]), entry["goal"]
            waiting = asked & selected
        elif event == "changed":
            deadlines[at] = entry["deadline_seconds"] or deadline
        elif event == "asked":
            asked.add(client)
            waiting |= {client} & selected
        elif event == "received" and entry.get("overdue"):
            found[client] = Past(at, deadlines.get(at, deadline), missed=True)
        elif event == "received" and _is_measured(entry):
            found[client] = Past(at, float(entry["seconds"]))
        elif event in ("validated", "failed"):
            waiting.discard(client)
        elif event in ("closed", "abandoned"):
            counted = entry["clients" if event == "closed" else "accepted"]
            if len(counted) < goal:  # else nobody waited for the others until the deadline
                found |= {client: Past(at, deadlines[at], missed=True) for client in waiting - set(counted)}
            waiting = set()
    return found


def _is_measured(entry: dict[str, Any]) -> bool:
    return 1e-3 <= (entry.get("seconds") or 0) <= 1e9  # so that no speed overflows
