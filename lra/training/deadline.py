"""When does a run that may not run longer have to stop, so that its state is saved in time?"""

import re
import time
from collections.abc import Callable

from lra.errors import ConfigError

ENDING_S, ENDING_SHARE = (
    30.0,
    0.05,
)  # of a limit, what is left for the last words: the record, the tracker, the exit
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


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


def seconds_of(key: str, value: object) -> float | None:
    """Seconds of a duration: a number, "3h30m", "1d12h", "HH:MM:SS", "D-HH:MM:SS" as SLURM writes it; None for null.

    Raises:
        ConfigError: `value`, that of `key`, is none of these, or not above 0.
    """
    if value is None:
        return None
    text = str(value).strip()
    total = 0.0
    if not isinstance(value, bool):
        if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
            total = float(text)
        elif units := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text):
            total = sum(
                int(n or 0) * size for n, size in zip(units.groups(), UNITS.values(), strict=True)
            )
        elif clock := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text):
            total = sum(
                int(n or 0) * size for n, size in zip(clock.groups(), UNITS.values(), strict=True)
            )
    if total <= 0:
        raise ConfigError(
            f"{key}={value} must be a duration above 0: seconds, 3h30m, HH:MM:SS, D-HH:MM:SS, or null"
        )
    return float(total)
