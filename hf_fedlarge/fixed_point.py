"""Vectors as whole numbers modulo 2^32, so that their sum can be computed under masks (`secagg.py`), and back.

A client's numbers are clipped to ± `limit`, multiplied by its weight and cut to whole steps; the weight itself is one
more word, and how many numbers were clipped another. The steps are as fine as they can be with the sum of all
clients within 31 bits: with n clients of equal weight a step is `limit` · n / 2^30, and the mean is that of the
clipped vectors less at most one step in each number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hf_fedlarge.errors import ArtifactError

WORD_BYTES = 4
MORE_WORDS = 2  # the weight, and what was clipped


class Mean(NamedTuple):
    """The weighted mean of the clients' vectors: `steps` (int32) of how much each, and what was clipped in all."""

    steps: np.ndarray
    step: float
    clipped: int

    def values(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Some of its numbers, in fp64."""
        return self.steps[start:end] * self.step


def levels(clients: int) -> int:
    """The largest whole number of which so many clients' sum is one of 31 bits with a sign.

    The 32nd is left free, so that nonsense, half of whose words have it, is no sum (`mean_of`).
    """
    return (2**30 - 1) // clients


def weight_level(weight: float, most: float, clients: int) -> int:
    """A weight of up to `most` as a whole number from 1 to `levels`."""
    return max(1, min(levels(clients), round(levels(clients) * weight / most)))


def quantized(parts: Iterable[np.ndarray], count: int, limit: float, level: int) -> np.ndarray:
    """A vector as words to be masked: `level` · value / `limit`, cut toward zero, then the weight and what was clipped.

    Values beyond ± `limit` are clipped. Cut toward zero a vector never becomes longer, so what bounds its norm goes on
    to. A client loses less than one step, `limit` / `level`, of each value.

    Args:
        parts: the vector's parts in order, each (size,) in fp64 and finite.
        count: their sizes' sum.
        limit: how large a value may be.
        level: the client's weight, as `weight_level` gives it.

    Returns:
        (count + 2,) uint32.
    """
    words = np.empty(count + MORE_WORDS, dtype=np.uint32)
    start = clipped = 0
    for values in parts:
        assert np.isfinite(values).all()
        whole = np.trunc(np.clip(values, -limit, limit) * (level / limit))
        words[start : start + len(values)] = whole.astype(np.int32).view(np.uint32)
        clipped += int(np.count_nonzero(np.abs(values) > limit))
        start += len(values)
    assert start == count
    words[count:] = level, min(level, clipped)
    return words


def count_told(values: np.ndarray, limit: float, level: int) -> int:
    """How many of a vector's numbers `quantized` neither cuts to nothing nor clips."""
    sizes = np.abs(values)
    return int(np.count_nonzero((sizes * (level / limit) >= 1) & (sizes <= limit)))


def mean_of(total: np.ndarray, limit: float, clients: int, count: int, *, equal: bool) -> Mean:
    """The mean of an unmasked sum: its error is below `count` · `limit` / (the sum of the levels) in each value.

    Args:
        total: (values + 2,) uint32, the sum of what `quantized` gave.
        limit: as there.
        clients: how many `levels` was for.
        count: how many vectors are in the sum.
        equal: whether all have the highest weight.

    Raises:
        ArtifactError: no such vectors sum up to this.
    """
    signed, weight, clipped = total[:-MORE_WORDS].view(np.int32), int(total[-2]), int(total[-1])
    most = count * levels(clients)
    if not (most if equal else count) <= weight <= most:
        raise ArtifactError(
            f"The sum of the weights is {weight}; expected {'' if equal else f'{count} to '}{most} of {count} clients: "
            "one of them sent something else than was asked for."
        )
    largest = max(-int(signed.min(initial=0)), int(signed.max(initial=0)))
    if largest > weight:
        raise ArtifactError(
            f"The sum has a value of {largest} steps; expected at most {weight}, the sum of the weights: one of the "
            f"{count} clients sent something else than was asked for."
        )
    return Mean(signed, limit / weight, clipped)
