"""Versions and commit of the code that runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lra.runs import machine

ROOT = Path(__file__).resolve().parents[2]


def test_versions_cover_the_numerical_packages():
    found = machine.versions()
    assert set(found) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "lra"}
    assert found["numpy"] == np.__version__


def test_peak_memory_and_cores_are_plausible():
    assert 2**24 < machine.peak_bytes() < 2**40
    assert 1 <= machine.cores() <= 4096
    assert machine.cpu_name()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a copy of the module, a git command, and the commit the copy reports."""
    home, package = tmp_path / "repo", tmp_path / "repo" / "lra" / "runs"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "lra" / "runs" / "machine.py", package)

    def git(*arguments):
        user = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *user, *arguments]
        return subprocess.run(command, cwd=home, check=True, capture_output=True, text=True).stdout

    def commit_seen():
        code = "from lra.runs.machine import git_commit; print(git_commit())"
        environment = {"PYTHONPATH": str(home), "PATH": os.environ["PATH"]}
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    return home, git, commit_seen


def test_a_commit_may_be_missing_only_from_a_whole_history(monkeypatch):
    head = machine.git_commit().removesuffix("+dirty")
    assert machine.has_commit(head)
    assert machine.has_commit("0123abcd") is False
    monkeypatch.setattr(machine, "_git", lambda _, verb, *rest: {"rev-parse": "true"}.get(verb))
    monkeypatch.setattr(machine, "_checkout", lambda: ROOT)
    assert machine.has_commit.__wrapped__("0123abcd") is None


def test_the_commit_is_of_the_code_that_runs(checkout):
    home, git, commit_seen = checkout
    git("commit", "-q", "--allow-empty", "-m", "another repository")
    assert commit_seen() == "None"  # as in a virtual environment inside it
    git("add", "lra")
    git("commit", "-q", "-m", "ours")
    head = git("rev-parse", "--short", "HEAD").strip()
    (home / "runs").mkdir()
    (home / "runs" / "result").touch()
    assert commit_seen() == head
    (home / "lra" / "new_model.py").touch()
    assert commit_seen() == f"{head}+dirty"
