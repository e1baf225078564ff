"""What a round cost, what its clients say of what it began with, and whether what came of it is of any use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_fedlarge.journal import Journal
from hf_fedlarge.memory import peak_memory_bytes
from hf_fedlarge.update import measured, read_update


def traffic(journal: Journal, number: int) -> dict[str, Any]:
    """Bytes that a round moves on a real network, as the journal has them: to each client asked, and from it."""
    by_client: dict[str, dict[str, int]] = {}
    for entry in journal.find("asked", "received", "told", round=number):
        bytes_of = by_client.setdefault(entry["client"], {"down": 0, "up": 0})
        bytes_of[entry.get("way") or {"asked": "down", "received": "up"}[entry["event"]]] += entry["bytes"]
    down, up = (sum(entry[way] for entry in by_client.values()) for way in ("down", "up"))
    return {
        "bytes_by_client": by_client,
        "bytes_down": down,
        "bytes_up": up,
        "bytes_down_per_client": down // len(by_client),
        "bytes_up_per_client": up // len(by_client),
    }


def broken_by(losses: dict[str, float], updates: list[Path]) -> str | None:
    """Why the adapter that was made of these updates is broken, and whose they are; None: its losses are finite."""
    if all(map(math.isfinite, losses.values())):
        return None
    names = ", ".join(sorted({update.name for update in updates}))
    found = ", ".join(f"{name} is {loss:g}" for name, loss in losses.items())
    return (
        f"{found} with the adapter made of the updates of {names}, which count no more; leave those out of clients "
        "whose update breaks it."
    )


def peaks(updates: list[Path]) -> dict[str, int]:
    """The largest resident size so far of this process, and of a client's, which in-process is the same one."""
    clients = max(int(measured(update).get("peak_memory_bytes", 0)) for update in updates)
    return {"peak_memory_bytes": max(peak_memory_bytes(), clients), "client_peak_memory_bytes": clients}


def client_loss(updates: list[Path]) -> dict[str, Any] | None:
    """The mean of the clients' held-out losses `before` they trained, weighted by their examples, and of how many.

    So it is a federated evaluation of the adapter that the round began with, in the package, by the clients' word.
    None: nobody said any.
    """
    said = [manifest for manifest in map(read_update, updates) if manifest.loss_before is not None]
    if not said:
        return None
    total = sum(manifest.loss_before * manifest.examples for manifest in said)
    return {"before": total / sum(manifest.examples for manifest in said), "clients": len(said)}
