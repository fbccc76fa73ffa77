"""Errors with one line for the user: what was found, what is valid, what to change."""

from typing import Any


class LraError(Exception):
    """Ends a command with its message on one line and `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(LraError):
    """A value on the command line or in a YAML file is invalid."""

    exit_code = 2


class DataError(LraError):
    """A data file is missing, truncated or malformed."""

    exit_code = 3


class RunFolderError(LraError):
    """The run folder is in use or contains a run that must not be overwritten."""

    exit_code = 4


class DivergedError(LraError):
    """The loss became NaN or infinite."""

    exit_code = 5


class MismatchError(LraError):
    """A stored result was not reproduced."""

    exit_code = 6


class PreemptedError(LraError):
    """A signal or time limit ended the run; the same command with `resume=auto` continues it."""

    exit_code = 75  # EX_TEMPFAIL, which schedulers may retry


def first_problem(error: Any) -> str:
    """The first problem of a `pydantic.ValidationError` on one line, with the place in the data."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]]))
