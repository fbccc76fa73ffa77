"""Stops a run in time: SIGINT and SIGTERM, and the wall-time limit `trainer.time_limit`."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lra.errors import PreemptedError

EXIT_S = 30.0  # reserved for the record, the tracker and the exit of the process
EXIT_SHARE = 0.05  # at most this share of the limit
TRACKER_SHARE = 2 / 3  # of the time that is left for the exit
TRACKER_LATE_S = 1.0  # if the limit has passed, as it may in the final scoring


class Signals:
    """Handles SIGINT and SIGTERM inside a `with` block.

    A signal raises KeyboardInterrupt at once, unless `deferred` is active. `received` is the name
    of the last signal, None before the first.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # outside the main thread Python allows no handlers
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        repeated, self.received = self.received is not None, signal.Signals(number).name
        if not self._deferred or (repeated and number == signal.SIGINT):
            raise KeyboardInterrupt
        message = f"lra: {self.received}: saving after the current steps; Ctrl-C stops at once\n"
        # The signal may interrupt a write to sys.stderr, and neither print nor logging may then
        # write to it: RuntimeError, reentrant call.
        with suppress(OSError):
            os.write(2, message.encode())

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal only sets `received`, so that the training loop can save first.

        A second signal that is a SIGINT raises KeyboardInterrupt.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def sigterm_preempts(self) -> Iterator[None]:
        """Converts the KeyboardInterrupt of a SIGTERM, so that the run ends as preempted.

        Raises:
            PreemptedError: after a SIGTERM outside of `deferred`.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self.received != "SIGTERM":
                raise
            raise PreemptedError(
                "stopped by SIGTERM; the same command with resume=auto continues from the last "
                "checkpoint, if there is one"
            ) from None


class Deadline:
    """Computes when a run must save and stop to stay within its time limit.

    Args:
        limit: seconds from `started`, None for no limit.
        started: value of `clock` at the start of the run.
        clock: returns seconds.
    """

    def __init__(
        self, limit: float | None, started: float, clock: Callable[[], float] = time.monotonic
    ):
        self.limit, self.started, self.clock = limit, started, clock
        self._last_check: float | None = None
        self._intervals = 0
        self._longest_interval = self._longest_save = 0.0

    def reached(self) -> bool:
        """Returns whether another iteration, a save and the exit may no longer fit.

        Call it once per iteration of the training loop. An iteration is expected to take as long as
        the longest so far, except the first, which compiles.
        """
        if self.limit is None:
            return False
        now = self.clock()
        if self._last_check is not None:
            self._intervals += 1
            if self._intervals > 1:
                self._longest_interval = max(self._longest_interval, now - self._last_check)
        self._last_check = now
        reserve = self._longest_interval + self._longest_save + min(EXIT_S, EXIT_SHARE * self.limit)
        return now - self.started + reserve >= self.limit

    def record_save(self, seconds: float) -> None:
        """Notes the duration of a checkpoint save."""
        self._longest_save = max(self._longest_save, seconds)

    def tracker_seconds(self) -> float:
        """Returns how long the tracker may take at the end of the run; inf without a limit."""
        if self.limit is None:
            return math.inf
        left = self.limit - (self.clock() - self.started)
        return TRACKER_SHARE * left if left > 0 else TRACKER_LATE_S
