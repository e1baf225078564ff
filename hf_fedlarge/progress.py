"""Bars of progress: the command line's own, and those of libraries that it hides; and times in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def progress_bar(what: str, total: int | None, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """A bar, shown from the first step on; what it yields is called with how much is done. `total` may be unknown."""
    from tqdm import tqdm

    with ExitStack() as shown:
        bar = None

        def advance(done: int) -> None:
            nonlocal bar
            if bar is None:
                bar = shown.enter_context(tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=None))
            bar.update(done - bar.n)

        yield advance


def spell_seconds(seconds: float) -> str:
    """A time as people say it: `1 h 52 min`, `6 h`, `12 min`, `40 s`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0)
    return " ".join(parts)


def by_tenths(report: Callable[[str], None], what: str, total: int, unit: str = "layers") -> Callable[[int], None]:
    """A function that is told of every layer, or other unit, that is done, and reports a line for each tenth of them.

    How long the others take is told by those since the first that it was told of: what was interrupted goes on there.
    """
    first, since = total, 0.0

    def advance(done: int) -> None:
        nonlocal first, since
        now = time.monotonic()
        if done <= first:
            first, since = done, now
        if done * 10 // total > (done - 1) * 10 // total:
            known = first < done < total
            left = f", about {spell_seconds((now - since) / (done - first) * (total - done))} left" if known else ""
            report(f"{what}: {done} of {total} {unit} are done{left}")

    return advance


def hide_bars() -> None:
    """Of all the bars of all the clients, those of the training steps tell enough."""
    from transformers.utils import logging

    from hf_fedlarge.data import hide_progress

    hide_progress()
    logging.disable_progress_bar()
