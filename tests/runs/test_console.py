"""The handler of the `lra` logger."""

import io
import logging
import sys

import pytest

from lra.runs.console import StderrHandler, configure_logging

log = logging.getLogger("lra.runs.test")


@pytest.fixture(autouse=True)
def lra_logger():
    """The `lra` logger without a handler, restored afterwards."""
    logger = logging.getLogger("lra")
    handlers, level = logger.handlers[:], logger.level
    logger.handlers[:] = []
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_a_message_is_one_line_on_stderr_with_its_level(capsys):
    configure_logging()
    log.info("saving")
    log.warning("%s\n  and more", "low")
    log.error("two  spaces stay")
    log.error("\x1b[2J of a damaged file")
    log.debug("hidden")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "lra: saving",
        "lra: warning: low and more",
        "lra: error: two  spaces stay",
        "lra: error: \\x1b[2J of a damaged file",
    ]


def test_configuration_twice_prints_once(capsys, lra_logger):
    configure_logging()
    configure_logging()
    assert [type(handler) for handler in lra_logger.handlers] == [StderrHandler]
    log.warning("once")
    assert capsys.readouterr().err == "lra: warning: once\n"


def test_a_closed_stderr_is_no_error(monkeypatch):
    configure_logging()
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    log.warning("dropped")
