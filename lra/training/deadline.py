"""When does a run that may not run longer have to stop, so that its state is saved in time?"""

import time
from collections.abc import Callable

ENDING_S, ENDING_SHARE = (
    30.0,
    0.05,
)  # of a limit, what is left for the last words: the record, the tracker, the exit


class Deadline:
    """`reached` is true from the last moment at which a step more, an evaluation and a save still fit.

    Args:
        limit: seconds from `started`, None for no limit.
        clock: gives seconds.
    """

    def __init__(
        self, limit: float | None, started: float, clock: Callable[[], float] = time.monotonic
    ):
        self.limit, self.started, self.clock = limit, started, clock
        self.before: float | None = None  # the last look at the clock
        self.laps = 0
        self.longest = self.save_s = 0.0

    def reached(self) -> bool:
        """To be asked after every call and what was due after it."""
        if self.limit is None:
            return False
        now = self.clock()
        if self.before is not None:
            self.laps += 1
            if self.laps > 1:  # the first compiles, and will not again
                self.longest = max(self.longest, now - self.before)
        self.before = now
        ending = min(ENDING_S, ENDING_SHARE * self.limit)
        return now - self.started + self.longest + self.save_s + ending >= self.limit

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self.save_s = max(self.save_s, seconds)
