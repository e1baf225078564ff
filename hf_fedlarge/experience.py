"""What the server has seen of clients in earlier rounds, from the run's journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hf_fedlarge.journal import Journal
from hf_fedlarge.plan import CheckIn


def seen(check_ins: Sequence[CheckIn], journal: Journal) -> list[CheckIn]:
    """The check-ins with what the server saw of each client in earlier rounds: its answers and its speed."""
    asked = Counter(entry["client"] for entry in journal.find("asked"))
    answered = Counter(entry["client"] for entry in journal.find("validated", accepted=True))
    speed = {
        entry["client"]: entry["tokens"] / entry["seconds"]
        for entry in journal.find("received")
        if entry.get("tokens") and 1e-3 <= (entry.get("seconds") or 0) <= 1e9  # the client's word: no speed overflows
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
