"""Who trains in a round: clients check in with what they have, and a seeded cohort is drawn.

A policy is a function that gives each client a weight; the chance to be drawn goes with it. Weights come from what
clients say of themselves (examples, memory) and from what the server saw of them (answers, speed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_fedlarge.errors import ConfigError


@dataclass(frozen=True)
class CheckIn:
    """A client that is there.

    Attributes:
        client: its name.
        examples: what it says it has to train on.
        memory_bytes: what it says it has; None: it does not say.
        tokens_per_second: as measured in its last update; None: it has not trained yet.
        asked, answered: how often the server asked it to train, and got an update that counted.
    """

    client: str
    examples: int
    memory_bytes: int | None = None
    tokens_per_second: float | None = None
    asked: int = 0
    answered: int = 0


def _speeds(check_ins: Sequence[CheckIn]) -> list[float]:
    """Clients that have not trained yet count as the mean of the others."""
    known = [check_in.tokens_per_second for check_in in check_ins if check_in.tokens_per_second]
    mean = float(np.mean(known)) if known else 1.0
    return [check_in.tokens_per_second or mean for check_in in check_ins]


# What a client's chance to be drawn goes with. Availability is the share of answers as Laplace would expect it, so
# that a client that was never asked has a chance of one half and one that never answers keeps a small one.
SELECTIONS: dict[str, Callable[[Sequence[CheckIn]], list[float]]] = {
    "uniform": lambda check_ins: [1.0] * len(check_ins),
    "data": lambda check_ins: [float(check_in.examples) for check_in in check_ins],
    "availability": lambda check_ins: [(c.answered + 1) / (c.asked + 2) for c in check_ins],
    "resources": _speeds,
}


def who_can(check_ins: Sequence[CheckIn], needed_bytes: int = 0) -> list[CheckIn]:
    """Those with data and, as far as they say, the memory that is needed; by name."""
    return sorted(
        (
            check_in
            for check_in in check_ins
            if check_in.examples > 0 and (check_in.memory_bytes is None or check_in.memory_bytes >= needed_bytes)
        ),
        key=lambda check_in: check_in.client,
    )


def sample_cohort(
    check_ins: Sequence[CheckIn],
    size: int | None,
    seed: int,
    round_number: int,
    needed_bytes: int = 0,
    *,
    selection: str = "uniform",
    spare: float = 0.0,
    attempt: int = 1,
) -> list[str]:
    """Draw a round's clients without replacement; the same seed, round and attempt draw the same.

    Args:
        check_ins: the clients that are there.
        size: how many are wanted; None: all that can take part.
        seed: of the federation.
        round_number: of this round.
        needed_bytes: memory a client needs; those that say they have less are left out, as are those without data.
        selection: the policy, of `SELECTIONS`.
        spare: how many more to draw, as a share of `size`, for those that won't answer in time; as far as there are.
        attempt: of this round; another one draws others.

    Returns:
        Client names in the order they were drawn, or sorted where all take part.

    Raises:
        ConfigError: fewer can take part than `size`.
    """
    able = who_can(check_ins, needed_bytes)
    if not able or (size is not None and size > len(able)):
        memory = f" and {needed_bytes / 1e6:.0f} MB of memory" if needed_bytes else ""
        raise ConfigError(
            f"{len(able)} of {len(check_ins)} clients have data{memory}; a cohort of {size or 1} is wanted."
        )
    if size is None:
        return [check_in.client for check_in in able]
    chances = np.array(SELECTIONS[selection](able))
    drawn = np.random.default_rng([seed, round_number, attempt]).choice(
        len(able), size=min(len(able), round(size * (1 + spare))), replace=False, p=chances / chances.sum()
    )
    return [able[index].client for index in drawn]
