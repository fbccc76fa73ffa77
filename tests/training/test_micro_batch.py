"""The micro-batch that fits, bad sizes, and running out of memory."""

import os
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_checks import assert_equal, state_of

import lra
from lra.config.compose import run_config
from lra.errors import ConfigError, DataError, LraError, PreemptedError
from lra.runs.progress import Reporter
from lra.runs.records import read_record, run_path
from lra.training import micro_batch, prefetch
from lra.training.memory import compiled_bytes
from lra.training.micro_batch import halvings, largest_that_fits, micro_batch_sizes
from lra.training.step import make_step_functions

EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")


def test_sizes_divide_the_batch_and_the_devices_share_them():
    assert micro_batch_sizes(12) == [12, 6, 4, 3, 2, 1]
    assert micro_batch_sizes(12, devices=4) == [12, 4]
    assert halvings(48) == [48, 24, 12, 6, 3, 1]
    assert halvings(50, devices=5) == [50, 25, 10, 5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.micro_batch=3",
            "trainer.micro_batch=3 must be a divisor of trainer.batch_size=4; use 2 or 4",
        ),
        ("trainer.micro_batch=8", "divisor of trainer.batch_size=4; use 2 or 4, or auto"),
        (
            "trainer.micro_batch=0",
            "trainer.micro_batch=0 must be a whole number of at least 1 or auto or null",
        ),
        (
            "trainer.micro_batch=auto",
            "trainer.micro_batch=auto makes the result depend on the free memory",
        ),
        ("trainer.micro_batch=most", "trainer.micro_batch=most must be a whole number"),
        ("trainer.devices=99", "trainer.devices=99: this process has .* take at most"),
    ],
)
def test_bad_values_are_refused_in_one_line(tiny, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        lra.train([*tiny, override])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
def test_auto_takes_the_largest_micro_batch_that_the_memory_holds(tiny, made, monkeypatch, capsys):
    # activations, not the sum of gradients, take the memory
    longer = ["model=lru", "task.max_length=250", "backbone.norm=layer"]
    setup, data = made("trainer.batch_size=4", *longer)
    needs = {}
    for size in (4, 2):
        run = make_step_functions(setup, 4, size).train_steps
        needs[size] = compiled_bytes(
            run.lower(state_of(setup), setup.constants, data, np.int32(0)).compile()
        )
    assert needs[2] < needs[4]
    monkeypatch.setattr(micro_batch, "device_bytes", lambda device: needs[4] - 1)
    here = [*tiny, *longer, "trainer.micro_batch=auto", "trainer.steps=4", "trainer.eval_every=4"]
    here += ["trainer.call_seconds=1e-9"]  # one step per call
    made_sizes = []
    monkeypatch.setattr(
        micro_batch,
        "make_step_functions",
        lambda *args: made_sizes.append(args[2]) or make_step_functions(*args),
    )
    advance = Reporter.advance
    monkeypatch.setattr(Reporter, "advance", lambda self, *_: os.kill(os.getpid(), 15))
    with pytest.raises(PreemptedError):
        lra.train(here)
    found = re.search(
        r"micro-batch 2 of 4 examples \(4 needs .*\); evaluations take (\d+)",
        capsys.readouterr().out,
    )
    assert int(found[1]) < 256  # which would need more than the step
    assert made_sizes == [4, 2]  # what fitted is what trains
    # a start that ends before it trains leaves what the next one goes by
    with monkeypatch.context() as patch:
        gone = Mock(side_effect=DataError("gone"))
        patch.setattr("lra.training.setup.prepare", gone)
        with pytest.raises(DataError):
            lra.train([*here, "resume=auto"])
    cfg = lra.compose(here)
    kept = read_record(run_path(cfg.output.root, run_config(cfg), dict(cfg.names)))
    assert (kept["status"], kept["step"], kept["micro_batch"]) == ("failed", 1, 2)
    assert kept["data"]["splits"]["train"]["count"] == 64
    # with all the memory in the world, a resumed run keeps what it began with
    monkeypatch.setattr(micro_batch, "device_bytes", lambda device: None)
    monkeypatch.setattr(Reporter, "advance", advance)
    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [1]
    assert (resumed["micro_batch"], resumed["eval_batch"]) == (2, int(found[1]))
    assert [(part["step"], part["count"], part["micro_batch"]) for part in resumed["segments"]] == [
        (0, 1, 2),
        (1, 1, 2),
    ]
    explicit = lra.train([*here, "trainer.micro_batch=2", f"trainer.eval_batch_size={found[1]}"])
    assert explicit["metrics"] == resumed["metrics"]


def test_auto_halves_where_the_device_runs_out_of_memory(monkeypatch):
    tried = []

    class Full:
        def __init__(self, size):
            self.size = size

        def lower(self, *args):
            return jax.jit(lambda: 0).lower()

        def __call__(self):
            tried.append(self.size)
            if self.size > 2:
                raise EXHAUSTED
            return jnp.zeros(())

    def trial(size):
        return Full(size), ()

    found, needs = largest_that_fits("a micro-batch", [8, 4, 2, 1], trial)
    assert (found, tried, list(needs)) == (2, [8, 4, 2], [8, 4, 2])
    with pytest.raises(
        LraError, match=r"out of memory even at a micro-batch of 4.*trainer.remat=block"
    ):
        largest_that_fits("a micro-batch", [8, 4], trial)
    # what the compiler says is enough, and several devices of a CPU have one memory
    monkeypatch.setattr(micro_batch, "compiled_bytes", lambda compiled: 300)
    monkeypatch.setattr(micro_batch, "device_bytes", lambda device: 1000)
    tried.clear()
    assert largest_that_fits("a micro-batch", [8, 4], trial, sharing=3, execute=False)[0] == 8
    with pytest.raises(LraError, match="out of memory even at a micro-batch of 4"):
        largest_that_fits("a micro-batch", [8, 4], trial, sharing=4)
    assert not tried


@pytest.mark.slow
def test_a_trial_takes_a_step_of_its_own_state(made):
    setup, data = made()
    before = jax.device_get(setup.params)
    function, args = prefetch.DeviceData(data).jitted_call(
        make_step_functions(setup, 8), state_of(setup), setup.constants, 1
    )
    assert int(function(*args).step) == 1
    assert_equal(setup.params, before)
