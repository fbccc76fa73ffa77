"""Standard streams of the command line: the handler of the `lra` logger, and a closed stdout."""

import logging
import multiprocessing
import os
import sys
from contextlib import suppress


def printable(text: str) -> str:
    """`text` with escapes for control characters, which would drive the reader's terminal.

    Names, versions and messages of a record may come from others.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class StderrHandler(logging.Handler):
    """Prints `lra: LEVEL: message` on one line of stderr; info omits the level."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        message = printable(" ".join(line.strip() for line in self.format(record).splitlines()))
        with suppress(OSError, ValueError):  # a closed terminal or pipe ends no run
            print(f"lra: {level}{message}", file=sys.stderr, flush=True)


def configure_logging() -> None:
    """Adds the handler to the `lra` logger unless it has one, in each process that runs a job."""
    logger = logging.getLogger("lra")
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
        logger.setLevel(logging.INFO)
    if multiprocessing.parent_process() is not None:
        logger.propagate = False  # joblib's workers have a root handler
    root = logging.getLogger()
    if not root.handlers:  # otherwise a library's logging.info() adds one that repeats our records
        others = logging.StreamHandler()
        others.setLevel(logging.WARNING)
        others.addFilter(lambda record: not record.name.startswith("lra"))
        root.addHandler(others)


def discard_stdout() -> None:
    """Redirects stdout to /dev/null, after its reader closed the pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
