"""How a server waits for its clients, and either side for a store that can't be reached just now: what is said of it.

Waiting may take days, so a line comes when something changed; what goes on being wrong is said at growing pauses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from hf_fedlarge.errors import StoreError

_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 960.0  # seconds until the same trouble is said again; each is twice the one before
_NAMED = 20  # clients, in a line
T = TypeVar("T")


class Trouble:
    """Reports what is wrong, and the same again at growing pauses.

    Args:
        report: told of it in a line.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._next: dict[str, tuple[float, float]] = {}  # line → when it may come again, and the pause after that

    def __call__(self, line: str) -> None:
        """Report it, unless that was done a short while ago."""
        now = time.monotonic()
        due, pause = self._next.get(line, (now, _FIRST_PAUSE))
        if now >= due:
            self._next[line] = (now + pause, min(2 * pause, _LONGEST_PAUSE))
            self._report(line)


class Patience:
    """A server's.

    Args:
        report: told who is waited for, and what is wrong with the store.
        poll: seconds between two looks.
        seconds: after which waiting for clients, or for the store to be written, ends with an error.
    """

    def __init__(self, report: Callable[[str], None], poll: float, seconds: float) -> None:
        self._report, self._poll, self.seconds = report, poll, seconds
        self._trouble = Trouble(report)
        self._said: set[str] = set()
        self._last = ""

    def look(self, look: Callable[..., T], *arguments: Any) -> T | None:
        """What `look` gives; None where the store can't be reached just now, which the next look may mend."""
        try:
            return look(*arguments)
        except StoreError as error:
            self._trouble(f"{error}")
            return None

    def insist(self, write: Callable[..., T], *arguments: Any) -> T:
        """What `write` gives; where the store can't be written just now it is tried again while patience lasts.

        Raises:
            StoreError: it couldn't be written in all that time.
        """
        since = None
        while True:
            try:
                return write(*arguments)
            except StoreError as error:
                since = since or time.monotonic()
                if time.monotonic() - since > self.seconds:
                    raise
                self._trouble(f"{error} Trying again.")
                time.sleep(self._poll)

    def check(self, since: float, what: str) -> None:
        """End with a StoreError what has been waited for long enough."""
        if time.monotonic() - since > self.seconds:
            raise StoreError(f"Waited {self.seconds:g} s (patience) for {what}; the same command goes on.")

    def wait(self, since: float, missing: list[str], left: float | None) -> None:
        """Let the time until the next look for clients' answers go by.

        Args:
            since: when the last one came.
            missing: whose are waited for.
            left: seconds until the deadline; None: there is none, and patience counts.
        """
        if left is None:
            how = "and there is no deadline_seconds (give one, or take who is gone out of clients)"
            self.check(since, f"{', '.join(missing[:5])}, {how}")
        self.sleep(left)

    def sleep(self, left: float | None = None) -> None:
        """Until the next look, or the deadline in `left` seconds."""
        time.sleep(self._poll if left is None else max(0.0, min(self._poll, left + 0.01)))

    def progress(self, line: str, missing: Collection[str] = ()) -> None:
        """Report how far something is, and who is missing, unless that is what was reported last."""
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        line += f"; missing: {', '.join(list(missing)[:_NAMED])}{more}" if missing else ""
        if line != self._last:
            self._last = line
            self._report(line)

    def say(self, line: str) -> None:
        """Report something once."""
        if line not in self._said:
            self._said.add(line)
            self._report(line)
