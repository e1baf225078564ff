"""What secure aggregation costs clients and server, in seconds and bytes, without a network or a model.

    python scripts/bench/secure.py --clients 10 50 100 --lost 0.1

Every client of a round goes through all stages of `secagg.py` in this process, one after the other, with a vector of
`--numbers` (the default is what ffa trains of SmolLM2-135M at rank 16). The share `--lost` of them is lost after
its shares, the worst time: the server has to make its mask with every survivor again. Bytes are those of the documents
as a store has them, and of the masked vector. Every figure is of one client's turn, or the server's.

    python scripts/bench/secure.py --agreement

What it costs besides that clients sign their keys and the list of survivors (`agreement.py`).
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from hf_fedlarge import secagg
from hf_fedlarge.agreement import Agreement, agreed, check_agreement, quorum
from hf_fedlarge.fixed_point import WORD_BYTES, levels, mean_of, quantized
from hf_fedlarge.keys import AllowedKeys, ListedKey, PrivateKey
from hf_fedlarge.orders import as_bytes

SMOLLM2_FFA = 30 * 16 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)  # layers, rank, and rows of each matrix
LIMIT = 1.0


def measure(count: int, numbers: int, lost: float, share: float) -> dict[str, float]:
    """One attempt at a round of `count` clients."""
    names = [f"client-{number:04d}" for number in range(count)]
    secrets = {name: secagg.new_secrets() for name in names}
    keys = [secagg.advertised(name, secrets[name], "bench/1/1") for name in names]
    roster = secagg.Roster(context="bench/1/1", threshold=secagg.threshold_of(share, count), clients=keys)
    survivors = names[: count - int(lost * count)]

    began = time.perf_counter()
    sent = {name: secagg.shared(secrets[name], roster, name) for name in names}
    sharing = (time.perf_counter() - began) / count
    boxes = secagg.delivered(sent)

    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.01, numbers)
    total, masking = np.zeros(numbers + 2, np.uint32), 0.0
    for name in survivors:
        began = time.perf_counter()
        words = quantized([values], numbers, LIMIT, levels(count))
        secagg.add_masks(words, secrets[name], roster, name, names)
        masking += time.perf_counter() - began
        total += words

    began = time.perf_counter()
    messages = {}
    for name in survivors[: roster.threshold]:
        shares = secagg.opened(secrets[name], roster, name, boxes[name].boxes)
        messages[name] = secagg.revealed(shares, roster, name, survivors)
    revealing = (time.perf_counter() - began) / len(messages)

    began = time.perf_counter()
    recovered = secagg.recovered(roster, names, survivors, messages)
    reconstructing = time.perf_counter() - began
    began = time.perf_counter()
    secagg.remove_masks(total, roster, survivors, recovered)
    mean = mean_of(total, LIMIT, count, len(survivors), equal=True)
    unmasking = time.perf_counter() - began
    error = np.abs(mean.values() - values).max()
    assert error <= LIMIT / levels(count), f"{error} at {count} clients"
    up = len(as_bytes(keys[0])) + len(as_bytes(sent[names[0]])) + len(as_bytes(messages[names[0]]))
    return {
        "clients": count,
        "lost": count - len(survivors),
        "share, s": sharing,
        "mask, s": masking / len(survivors),
        "reveal, s": revealing,
        "server: secrets, s": reconstructing,
        "server: masks, s": unmasking,
        "vector, MB": (numbers + 2) * WORD_BYTES / 1e6,
        "messages up, kB": up / 1e3,
        "messages down, kB": (len(as_bytes(roster)) + len(as_bytes(boxes[names[0]]))) / 1e3,
        "error": float(error),
    }


def measure_agreement(count: int, share: float) -> dict[str, float]:
    """The same of the signatures alone, where as many sign as have to."""
    names = [f"client-{number:04d}" for number in range(count)]
    private = {name: PrivateKey.generate() for name in names}
    public = {name: key.public_key().public_bytes_raw().hex() for name, key in private.items()}
    listed = {name: [ListedKey(public=key, state="allowed", since="")] for name, key in public.items()}
    allowed, keys = AllowedKeys(clients=listed), []
    for name in names:
        keys.append(secagg.advertised(name, secagg.new_secrets(), "bench/1/1", private[name]))
    roster = secagg.Roster(context="bench/1/1", threshold=secagg.threshold_of(share, count), clients=keys)

    began = time.perf_counter()
    said = {name: agreed(name, private[name], roster, names, names) for name in names[: quorum(roster)]}
    signing = (time.perf_counter() - began) / len(said)
    agreement = Agreement(signatures={name: one.signature for name, one in said.items()})
    began = time.perf_counter()
    check_agreement(agreement, roster, names, names, allowed)
    checking = time.perf_counter() - began
    unsigned = roster.model_copy(update={"clients": [one.model_copy(update={"signature": None}) for one in keys]})
    return {
        "clients": count,
        "sign": len(said),
        "sign, ms": 1e3 * signing,
        "check, ms": 1e3 * checking,
        "keys' signatures in the roster, kB": (len(as_bytes(roster)) - len(as_bytes(unsigned))) / 1e3,
        "agreed, kB": len(as_bytes(said[names[0]])) / 1e3,
        "agreement, kB": len(as_bytes(agreement)) / 1e3,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100], help="in a round (10 50 100)")
    parser.add_argument("--numbers", type=int, default=SMOLLM2_FFA, help="in a vector (SmolLM2's in ffa at rank 16)")
    parser.add_argument("--lost", type=float, default=0.1, help="share of clients lost after their shares (0.1)")
    parser.add_argument("--threshold", type=float, default=2 / 3, help="more than this share has to stay (2/3)")
    parser.add_argument("--agreement", action="store_true", help="only what it costs to agree on the survivors")
    options = parser.parse_args(arguments)
    if options.agreement:
        figures = [measure_agreement(count, options.threshold) for count in options.clients]
    else:
        figures = [measure(count, options.numbers, options.lost, options.threshold) for count in options.clients]
    table = Table(*figures[0])
    for row in figures:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
