"""Layers as people write them: as ranges, counts and fractions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_fedlarge.errors import ConfigError


def format_ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs written as ranges: 0, 1, 2, 4 becomes `0-2, 4`; none at all becomes `none`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs) or "none"


def parse_layers(text: str | float | list[int], total: int) -> list[int] | int:
    """`--keep-layers`: a count (`20`), a fraction (`0.75`), or global layer numbers (`0-9,12,14-29`).

    Returns:
        A count of layers to choose, or the layers chosen, sorted.

    Raises:
        ConfigError: none kept, more than there are, a layer twice, or not readable.
    """
    expected = f"expected a count from 1 to {total}, a fraction above 0 and up to 1, or a list such as 0-9,12"
    if isinstance(text, list):
        layers = text
    elif re.fullmatch(r"\d+", str(text)):
        count = int(text)
        if not 1 <= count <= total:
            raise ConfigError(f"--keep-layers {text} is out of range: the model has {total} layers; {expected}.")
        return count
    elif re.fullmatch(r"\d*\.\d+|\d+\.", str(text)):
        fraction = float(text)
        if not 0 < fraction <= 1 or round(fraction * total) < 1:
            raise ConfigError(f"--keep-layers {text} keeps no valid share of {total} layers; {expected}.")
        return round(fraction * total)
    else:
        layers = []
        for part in str(text).split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise ConfigError(f"--keep-layers {text!r} can't be read at {part!r}; {expected}.")
            layers.extend(range(first, min(last, first + total) + 1))
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0 or max(layers) >= total:
        raise ConfigError(f"--keep-layers {text} names a layer twice, or one that is not in 0-{total - 1}; {expected}.")
    return sorted(layers)
