"""Who trains in a round: clients check in with what they have, and a seeded cohort is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_fedlarge.errors import ConfigError


@dataclass(frozen=True)
class CheckIn:
    """What a client says it has: examples to train on, and memory in bytes (None: it does not say)."""

    client: str
    examples: int
    memory_bytes: int | None = None


def sample_cohort(
    check_ins: Sequence[CheckIn], size: int | None, seed: int, round_number: int, needed_bytes: int = 0
) -> list[str]:
    """Draw a round's clients without replacement, each equally likely; the same seed and round draw the same.

    Args:
        check_ins: the clients that are there.
        size: how many to draw; None: all that can take part.
        seed: of the federation.
        round_number: of this round.
        needed_bytes: memory a client needs; those that say they have less are left out, as are those without data.

    Returns:
        Client names, sorted.

    Raises:
        ConfigError: fewer can take part than `size`.
    """
    able = sorted(
        check_in.client
        for check_in in check_ins
        if check_in.examples > 0 and (check_in.memory_bytes is None or check_in.memory_bytes >= needed_bytes)
    )
    if not able or (size is not None and size > len(able)):
        raise ConfigError(
            f"{len(able)} of {len(check_ins)} clients have data and {needed_bytes / 1e6:.0f} MB of memory; "
            f"a cohort of {size or 1} is wanted."
        )
    if size is None:
        return able
    drawn = np.random.default_rng([seed, round_number]).choice(len(able), size=size, replace=False)
    return sorted(able[index] for index in drawn)
