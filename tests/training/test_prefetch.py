"""Batches from the host equal those from the device."""

import time

import numpy as np
import pytest
from step_checks import assert_equal

import lra
from lra.runs.progress import Reporter
from lra.training import prefetch, trainer
from lra.training.data_parallel import DataParallel


@pytest.mark.parametrize("micro_batch", ["null", "2"])
def test_batches_from_the_host_give_the_same_run_bit_for_bit(
    tiny, tmp_path, monkeypatch, micro_batch
):
    monkeypatch.setattr(
        prefetch, "WINDOW_BYTES", 3 * 4 * 40
    )  # three steps: windows end between evaluations and in epochs
    options = [
        f"trainer.micro_batch={micro_batch}",
        "trainer.steps=40",
        "trainer.eval_every=7",
        "backbone.dropout=0.1",
    ]
    seen = []

    run = prefetch.HostPrefetch.run
    # the method, not the class: beartype takes two classes of one name, of two cases of this test, for one
    monkeypatch.setattr(
        prefetch.HostPrefetch,
        "run",
        lambda self, *a: seen.append(self.window_steps) or run(self, *a),
    )
    ends = []
    finish = trainer.Trainer.finish
    monkeypatch.setattr(
        trainer.Trainer,
        "finish",
        lambda run, state, *a: ends.append(state) or finish(run, state, *a),
    )
    on_the_device = lra.train([*tiny, *options])
    assert not seen
    from_the_host = lra.train(
        [*tiny, *options, "data.placement=host", f"output.root={tmp_path / 'host'}"]
    )
    assert set(seen) == {3}
    assert from_the_host["metrics"] == on_the_device["metrics"]
    assert from_the_host["selection"] == on_the_device["selection"]
    assert_equal(ends[0], ends[1])


def test_prefetch_reads_two_windows_ahead_and_stops(made, monkeypatch):
    setup, data = made()
    split = lra.training.state.Examples(*(np.asarray(x) for x in data))
    monkeypatch.setattr(prefetch, "WINDOW_BYTES", 1)
    source = prefetch.HostPrefetch(split, setup.order_key, 8, 8, DataParallel(), steps=30)
    window, begun = source.window, []
    monkeypatch.setattr(source, "window", lambda first: begun.append(first) or window(first))
    source.start(3)
    assert source.end(3) == 4
    assert source.end(4) == 5
    np.testing.assert_array_equal(source.current.batches.labels[0, 0], split.labels[source.rows(4)])
    deadline = time.monotonic() + 20
    while source.ready.qsize() < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # time enough for one too many
    assert begun == [3, 4, 5, 6]  # the current one is 4
    source.close()
    assert not source.thread.is_alive()
    assert source.ready.empty()


def test_waiting_for_data_counts_as_training_time(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(prefetch.DeviceData, "end", lambda self, step: time.sleep(0.05) or step + 1)
    advance = Reporter.advance
    monkeypatch.setattr(
        Reporter, "advance", lambda self, *a: told.append(a[2]) or advance(self, *a)
    )
    record = lra.train([*tiny, "trainer.steps=4", "trainer.eval_every=4"])
    assert min(told) >= 0.05
    assert record["time"]["train_s"] >= 0.15  # of three calls; the first one compiles


def test_an_error_of_the_prefetch_thread_reaches_the_run(made):
    setup, data = made()
    split = lra.training.state.Examples(*(np.asarray(x) for x in data))
    source = prefetch.HostPrefetch(split, setup.order_key, 8, 8, DataParallel(), steps=10)
    source.rows = lambda step: (_ for _ in ()).throw(OSError("the disk is gone"))
    source.start(0)
    with pytest.raises(OSError, match="the disk is gone"):
        source.end(0)
    source.close()


def test_auto_placement_follows_the_memory(tiny, monkeypatch):
    assert prefetch.fits_on_device(10**18, DataParallel())  # one CPU device reads the mapped file
    layout = DataParallel()
    layout.mesh = type("Two", (), {"local_devices": [0, 1]})()
    monkeypatch.setattr(prefetch, "device_bytes", lambda device: 1000)
    assert prefetch.fits_on_device(250, layout)
    assert not prefetch.fits_on_device(251, layout)
