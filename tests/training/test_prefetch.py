"""Training data on the device and on the host: the same batches, prefetch, placement."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from run_checks import assert_same_run, folder_of
from tiny import TINY

import lra
from lra.config.build import data_arguments
from lra.data.store import prepare
from lra.training import prefetch
from lra.training.data_parallel import DataParallel
from lra.training.prefetch import DeviceData, HostPrefetch, on_device, on_host
from lra.training.setup import Setup
from lra.training.state import initial_state
from lra.training.step import make_step_functions


@pytest.fixture(scope="module")
def made(data_root):
    """The setup of a tiny run, and its packed training data."""
    cfg = lra.compose([*TINY, "model=lru", f"data.root={data_root}", "trainer.batch_size=8"])
    setup = Setup(cfg)
    return setup, prepare(setup.task, **data_arguments(cfg)).splits["train"]


@pytest.fixture
def host(made, monkeypatch):
    """Data on the host with windows of one step."""
    setup, split = made
    monkeypatch.setattr(prefetch, "WINDOW_BYTES", 1)
    data = HostPrefetch(on_host(split), setup.order_key, 8, 8, DataParallel(), steps=30)
    yield data
    data.close()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", ["null", "2"])
def test_host_and_device_give_the_same_run_bit_for_bit(tiny, tmp_path, monkeypatch, micro_batch):
    # three steps: windows end between evaluations and within epochs
    monkeypatch.setattr(prefetch, "WINDOW_BYTES", 3 * 4 * 40)
    options = [
        f"trainer.micro_batch={micro_batch}",
        "trainer.steps=40",
        "trainer.eval_every=7",
        "backbone.dropout=0.1",
    ]
    window_steps = set()
    window = HostPrefetch.window
    monkeypatch.setattr(
        HostPrefetch,
        "window",
        lambda self, first: window_steps.add(self.window_steps) or window(self, first),
    )
    on_the_device = [*tiny, *options]
    lra.train(on_the_device)
    assert not window_steps
    on_the_host = [*on_the_device, "data.placement=host", f"output.root={tmp_path / 'host'}"]
    lra.train(on_the_host)
    assert window_steps == {3}
    assert_same_run(on_the_device, folder_of(on_the_host), folder_of(on_the_device))


def test_two_windows_are_prefetched(host, monkeypatch):
    window, begun, fourth = host.window, [], threading.Event()

    def noted(first):
        begun.append(first)
        if len(begun) == 4:
            fourth.set()
        return window(first)

    monkeypatch.setattr(host, "window", noted)
    host.start(3)
    assert host.available_until(3) == 4
    assert host.available_until(4) == 5
    np.testing.assert_array_equal(
        host.current.batches.labels[0, 0], host.split.labels[host.rows(4)]
    )
    assert fourth.wait(20)
    assert begun == [3, 4, 5, 6]  # 4 is the current one
    assert len(host.pending) == 2
    thread = next(iter(host.executor._threads))
    host.close()
    assert not thread.is_alive()
    assert host.current is None
    assert not host.pending


def test_prefetch_ends_with_the_run(host):
    host.start(28)
    assert [host.available_until(step) for step in (28, 29)] == [29, 30]
    assert not host.pending


def test_error_of_the_prefetch_thread_reaches_the_run(host):
    host.rows = lambda step: (_ for _ in ()).throw(OSError("the disk is gone"))
    host.start(0)
    with pytest.raises(OSError, match="the disk is gone"):
        host.available_until(0)


@pytest.mark.slow
def test_jitted_call_trains_before_the_prefetch_starts(made, host):
    """The choice of the micro-batch calls it with a state of its own."""
    setup, split = made
    step_fns = make_step_functions(setup, 8)
    before = jax.device_get(setup.params)
    losses = []
    for data in (DeviceData(on_device(split)), host):
        state, best = initial_state(setup)
        state = state._replace(params=best.params, batch_stats=best.batch_stats)
        function, args = data.jitted_call(step_fns, state, setup.constants, 1)
        after = function(*args)
        assert int(after.step) == 1
        losses.append(float(after.metric_sums[0]))
    assert losses[0] == losses[1]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(setup.params))


def test_auto_placement_follows_the_memory(monkeypatch):
    assert prefetch.fits_on_device(10**18, DataParallel())  # one CPU device uses the mapped file
    devices = DataParallel()
    devices.mesh = SimpleNamespace(local_devices=[0, 1])
    monkeypatch.setattr(prefetch, "device_bytes", lambda device: 1000)
    assert prefetch.fits_on_device(250, devices)
    assert not prefetch.fits_on_device(251, devices)
