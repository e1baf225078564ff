"""What the server has seen of clients in earlier rounds, from the run's journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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


def last_pace(journal: Journal, client: str, number: int) -> tuple[int, float] | None:
    """The round of a client's last update that came before round `number` began, and the seconds that it trained.

    They are the client's word. What comes late, while the round runs, changes nothing in it any more.
    """
    found = None
    for entry in journal.entries:
        if entry.get("round", 0) >= number:
            break
        if entry["event"] == "received" and entry["client"] == client and _is_measured(entry):
            found = entry["round"], float(entry["seconds"])
    return found


def _is_measured(entry: dict[str, Any]) -> bool:
    return 1e-3 <= (entry.get("seconds") or 0) <= 1e9  # so that no speed overflows
