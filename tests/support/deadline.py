"""A limit on the seconds of a block of code that may hang."""

import signal
from contextlib import contextmanager


@contextmanager
def deadline(seconds):
    """Raises TimeoutError in the main thread if the block takes longer."""

    def late(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
