"""Parallel calls on all cores. Imports no JAX, so that a worker watches its parent at once."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import joblib

from lra.errors import DataError

WATCH_SECONDS = 0.5  # between two looks of a worker at its parent


def parallel_map(
    function: Callable[..., Any], calls: Sequence[tuple], at_once: int
) -> Iterator[Any]:
    """Yield `function(*call)` for each call in order, computed on all cores.

    At most `at_once` results are in memory; joblib's own generators do not wait for the consumer.
    Raises DataError if a worker process was killed.
    """
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    try:
        with joblib.Parallel(
            n_jobs=max(1, min(joblib.cpu_count(), len(calls))),
            initializer=end_with_parent,
            initargs=(os.getpid(),),
        ) as parallel:
            for first in range(0, len(calls), at_once):
                yield from parallel(
                    joblib.delayed(function)(*call) for call in calls[first : first + at_once]
                )
    except TerminatedWorkerError as error:
        raise DataError(
            "a worker process was killed, perhaps for lack of memory; the same command continues "
            "from what is finished"
        ) from error


def end_with_parent(parent: int) -> None:
    """Start a thread that ends this worker soon after process `parent`, which a SIGKILL may end."""
    if os.getpid() == parent:  # a worker thread
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
