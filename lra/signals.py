"""Ctrl-C and SIGTERM: at once while nothing is lost by it, after a checkpoint while training."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
        if not self.patient or (self.received and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        print(
            f"lra: {self.received}: saving after the steps under way; Ctrl-C stops at once", file=sys.stderr, flush=True
        )

    @contextmanager
    def noted(self) -> Iterator[None]:
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
