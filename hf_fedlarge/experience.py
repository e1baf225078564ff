"""What the server has seen of clients in earlier rounds, from the run's journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hf_fedlarge.journal import Journal
from hf_fedlarge.plan import CheckIn


def seen(check_ins: Sequence[CheckIn], journal: Journal) -> list[CheckIn]:
    """The check-ins with what the server saw of each client in earlier rounds: its answers and its speed."""
    asked = Counter(entry["client"] for entry in journal.find("asked"))
    answered = Counter(entry["client"] for entry in journal.find("validated", accepted=True))
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


class Past(NamedTuple):
    """How long a client took in the round `round`; where it `missed` the deadline, that is the least it can be."""

    round: int
    seconds: float
    missed: bool = False


def last_paces(journal: Journal, number: int, deadline: float) -> dict[str, Past]:
    """Client → how long it took the last time that is known, of what the journal had when round `number` began.

    Seconds are a client's word. A client that was asked, and gave neither an update nor a reason until a deadline had
    passed, took at least as long as that. What comes late, while round `number` runs, changes nothing any more.
    """
    found: dict[str, Past] = {}
    asked, selected, waiting = set[str](), set[str](), set[str]()  # in a round, in an attempt, and not heard in that
    goal = 0
    for entry in journal.entries:
        at, event, client = entry.get("round", 0), entry["event"], entry.get("client")
        if at >= number:
            break
        if event == "selected":
            asked = asked if entry["attempt"] > 1 else set()  # who is asked again has no entry of that
            selected, goal = set(entry["clients"]), entry["goal"]
            waiting = asked & selected
        elif event == "asked":
            asked.add(client)
            waiting |= {client} & selected
        elif event == "received" and entry.get("overdue"):
            found[client] = Past(at, deadline, missed=True)
        elif event == "received" and _is_measured(entry):
            found[client] = Past(at, float(entry["seconds"]))
        elif event in ("validated", "failed"):
            waiting.discard(client)
        elif event in ("closed", "abandoned"):
            counted = entry["clients" if event == "closed" else "accepted"]
            if len(counted) < goal:  # else nobody waited for the others until the deadline
                found |= {client: Past(at, deadline, missed=True) for client in waiting - set(counted)}
            waiting = set()
    return found


def _is_measured(entry: dict[str, Any]) -> bool:
    return 1e-3 <= (entry.get("seconds") or 0) <= 1e9  # so that no speed overflows
