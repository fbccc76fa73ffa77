"""`trainer.deterministic`: XLA's flag, set before JAX starts."""

import json
import os
import subprocess
import sys

import jax
import pytest

from lra.errors import ConfigError
from lra.training import determinism
from lra.training.determinism import DETERMINISTIC_FLAG, backend_started, use_deterministic_ops


def test_flag_is_set_before_the_backend_starts_and_cannot_change_afterwards():
    code = """
import json, os
import jax
from lra.errors import ConfigError
from lra.training.determinism import backend_started, use_deterministic_ops
before = backend_started()
use_deterministic_ops(True)
flags = os.environ["XLA_FLAGS"]
devices = jax.local_device_count()
use_deterministic_ops(True)
try:
    use_deterministic_ops(False)
    message = None
except ConfigError as error:
    message = str(error)
print(json.dumps([before, flags, devices, backend_started(), message]))
"""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    before, flags, devices, after, message = json.loads(done.stdout)
    assert (before, flags, devices, after) == (False, DETERMINISTIC_FLAG, 1, True)
    assert message.startswith("trainer.deterministic=false is set too late, JAX has already")


def test_backend_of_this_process_has_started():
    jax.devices()
    count = jax.config.jax_num_cpu_devices
    assert backend_started()
    assert jax.config.jax_num_cpu_devices == count


def test_flag_of_a_run_is_removed_and_the_flag_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(determinism, "_flag_added", False)
    monkeypatch.setattr(determinism, "backend_started", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    use_deterministic_ops(True)
    assert os.environ["XLA_FLAGS"] == f"--a=1 {DETERMINISTIC_FLAG}"
    use_deterministic_ops(False)
    assert os.environ["XLA_FLAGS"] == "--a=1"
    monkeypatch.setenv("XLA_FLAGS", DETERMINISTIC_FLAG)
    use_deterministic_ops(False)
    assert os.environ["XLA_FLAGS"] == DETERMINISTIC_FLAG


def test_flag_is_refused_after_the_backend_has_started(monkeypatch):
    monkeypatch.setattr(determinism, "_flag_added", False)
    monkeypatch.setattr(determinism, "backend_started", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    use_deterministic_ops(False)
    with pytest.raises(
        ConfigError, match=f"true is set too late.*set XLA_FLAGS={DETERMINISTIC_FLAG}"
    ):
        use_deterministic_ops(True)
    assert os.environ["XLA_FLAGS"] == "--a=1"
    monkeypatch.setenv("XLA_FLAGS", DETERMINISTIC_FLAG)
    use_deterministic_ops(True)  # set by the user in time
