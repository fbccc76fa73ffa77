"""Errors a user can act on: one line that says what was found, what was expected and what to change."""


class LraError(Exception):
    """Ends a command with its message on one line and a non-zero exit code; no stack trace."""

    exit_code = 1


class ConfigError(LraError):
    """A value on the command line or in a YAML file cannot be used."""

    exit_code = 2


class DataError(LraError):
    """A data file is missing, truncated or malformed."""

    exit_code = 3


class RunFolderError(LraError):
    """The run's folder is in use or holds something that must not be overwritten."""

    exit_code = 4


class DivergedError(LraError):
    """The loss became NaN or infinite."""

    exit_code = 5


class MismatchError(LraError):
    """A stored result could not be reproduced."""

    exit_code = 6


class PreemptedError(LraError):
    """Stopped by a signal after saving a checkpoint; the same command with `resume=auto` continues."""

    exit_code = 75  # EX_TEMPFAIL: a scheduler may try again
