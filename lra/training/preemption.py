"""Ctrl-C and SIGTERM: at once while nothing is lost by it, after a checkpoint while training."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lra.errors import PreemptedError


class Signals:
    """SIGINT and SIGTERM stop at once; inside `noted` they are noted, so that the loop can save first.

    A second SIGINT stops at once there too.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.patient = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        except ValueError:  # only the main thread may listen; elsewhere the default stands
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        again, self.received = self.received, signal.Signals(number).name
        if not self.patient or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        print(
            f"lra: {self.received}: saving after the steps under way; Ctrl-C stops at once",
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """SIGTERM where it stops at once, before and after training, ends as it does in training: run it again.

        Raises:
            PreemptedError: instead of KeyboardInterrupt, after a SIGTERM.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self.received != "SIGTERM":
                raise
            raise PreemptedError(
                "stopped by SIGTERM; the same command with resume=auto goes on from the last checkpoint, if there is one"
            ) from None

    @contextmanager
    def noted(self) -> Iterator[None]:
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
