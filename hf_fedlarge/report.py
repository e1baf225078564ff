"""What a round cost: bytes on a real network, and memory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from hf_fedlarge.memory import peak_memory_bytes
from hf_fedlarge.update import measured


def traffic(updates: list[Path], adapter_bytes: int, package_bytes: int, have: Collection[str]) -> dict[str, Any]:
    """Bytes that a real network would carry: the package once a client, the adapter down and the update up.

    Args:
        updates: the round's update directories, named by client.
        adapter_bytes, package_bytes: what goes down.
        have: the clients that have the package already.
    """
    by_client = {
        update.name: {
            "down": adapter_bytes + (0 if update.name in have else package_bytes),
            "up": sum(path.stat().st_size for path in update.iterdir()),
        }
        for update in updates
    }
    down, up = (sum(entry[way] for entry in by_client.values()) for way in ("down", "up"))
    return {
        "bytes_by_client": by_client,
        "bytes_down": down,
        "bytes_up": up,
        "bytes_down_per_client": down // len(updates),
        "bytes_up_per_client": up // len(updates),
    }


def peaks(updates: list[Path]) -> dict[str, int]:
    """The largest resident size so far of this process, and of a client's, which in-process is the same one."""
    clients = max(int(measured(update).get("peak_memory_bytes", 0)) for update in updates)
    return {"peak_memory_bytes": max(peak_memory_bytes(), clients), "client_peak_memory_bytes": clients}
