"""How far long work has come and how long it may still take, on stderr."""

import sys
import time
from typing import Any


class Progress:
    """Called ``steps`` times, each time with what is done next.

    A bar of tqdm on a terminal; where there is no tqdm, a line that is rewritten; elsewhere lines, as for a log.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()
        self._bar = _bar(steps) if self._live else None

    def __call__(self, doing: str) -> None:
        if self._bar is not None:
            self._bar.update(self.step - self._bar.n)
            self._bar.set_description(doing)
        else:
            line = f"[{self.step + 1}/{self.steps}] {doing} ...{self._left()}"
            end = "" if self._live else "\n"
            print(f"\r\033[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)
        self.step += 1

    def clear(self) -> None:
        """Takes what is on a terminal away: before other lines, and at the end."""
        if self._bar is not None:
            self._bar.clear()
        elif self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _left(self) -> str:
        """If every step takes as long as those before."""
        if not self.step:
            return ""
        seconds = round((time.monotonic() - self._start) / self.step * (self.steps - self.step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        clock = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        return f" about {clock} left"


def _bar(steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=steps, file=sys.stderr, leave=False)
