"""Several devices give the run of one device and continue each other's checkpoints."""

import json
import re

import numpy as np
import pytest
from parallel_runs import PARALLEL_RUN, assert_close_run, run_python
from run_checks import folder_of
from tiny import TINY

import lra
from lra.runs.records import read_record
from lra.training.data_parallel import DataParallel

# Everything that needs four devices, in one process.
FOUR_DEVICES = """
import json, re, sys
import jax, numpy as np
import lra
from lra.config.build import data_arguments
from lra.data.store import prepare
from lra.errors import ConfigError, PreemptedError
from lra.training.data_parallel import DataParallel
from lra.training.prefetch import DeviceData, on_device
from lra.training.setup import Setup
from lra.training.state import initial_state
from lra.training.step import make_step_functions

overrides, root = json.loads(ARGUMENTS)
found = {}

for name, more in {
    "default": [],
    "micro_batch": ["trainer.micro_batch=4"],
    "host": ["data.placement=host"],
}.items():
    lra.train([*overrides, *more, f"output.root={root}/{name}"])

call = DeviceData.call
def call_and_signal(self, step_fns, state, constants, until):
    if until == 13:
        import os
        os.kill(os.getpid(), 15)
    return call(self, step_fns, state, constants, until)
DeviceData.call = call_and_signal
try:
    lra.train([*overrides, "trainer.log_every=13", f"output.root={root}/stopped"])
except PreemptedError as error:
    found["stopped"] = str(error)

found["refused"] = []
for more in (
    ["trainer.batch_size=6"],
    ["trainer.devices=5"],
    ["trainer.devices=3", "trainer.batch_size=9", "trainer.micro_batch=1"],
):
    try:
        lra.train([*overrides, *more, f"output.root={root}/refused"])
    except ConfigError as error:
        found["refused"].append(str(error))

# the collective operations of a compiled step
found["collectives"] = {}
for model in ("stu", "s4d", "mega", "transformer"):
    cfg = lra.compose([*overrides, f"model={model}"])
    setup, devices = Setup(cfg), DataParallel(jax.devices())
    data = on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])
    state, constants, data = devices.replicate((initial_state(setup)[0], setup.constants, data))
    run = make_step_functions(setup, 8, None, devices).train_steps
    text = run.lower(state, constants, data, np.int32(6)).compile().as_text()
    found["collectives"][model] = [
        len(re.findall(f" ({kinds})\\\\(", text))
        for kinds in ("all-reduce", "all-gather|all-to-all|collective-permute")
    ]
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def single_run(data_root, tmp_path_factory):
    """Runs on one device, by name: their overrides without output.root, and their folder."""
    runs = {}
    for name, more in {"default": [], "micro_batch": ["trainer.micro_batch=4"]}.items():
        overrides = [*TINY, *PARALLEL_RUN, *more, f"data.root={data_root}"]
        here = [*overrides, f"output.root={tmp_path_factory.mktemp(name)}"]
        lra.train(here)
        runs[name] = overrides, folder_of(here)
    return runs


@pytest.fixture(scope="module")
def four_devices(single_run, tmp_path_factory):
    """The results of FOUR_DEVICES, and the root of its runs."""
    root = tmp_path_factory.mktemp("four")
    arguments = json.dumps([single_run["default"][0], str(root)])
    out = run_python(f"ARGUMENTS = {arguments!r}\n{FOUR_DEVICES}", devices=4)
    return json.loads(out.rpartition("FOUND ")[2]), root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "micro_batch", "host"])
def test_four_devices_give_the_run_of_one(single_run, four_devices, name):
    overrides, _ = single_run["default"]
    more = {"micro_batch": ["trainer.micro_batch=4"]}.get(name, [])
    folder = folder_of([*overrides, *more, f"output.root={four_devices[1] / name}"])
    assert read_record(folder)["device"]["count"] == 4
    # batch norm depends on the micro-batch
    assert_close_run(folder, single_run["micro_batch" if more else "default"][1])


@pytest.mark.slow
def test_one_device_continues_a_checkpoint_of_four(single_run, four_devices):
    overrides, _ = single_run["default"]
    found, root = four_devices
    here = [*overrides, "trainer.log_every=13", f"output.root={root / 'stopped'}"]
    assert "stopped by SIGTERM at step 13 of 20" in found["stopped"]
    assert read_record(folder_of(here))["device"]["count"] == 4
    resumed = lra.train([*here, "resume=auto", "trainer.devices=1"])
    assert resumed["resumed_from"] == [13]
    assert resumed["device"]["count"] == 1
    assert [(part["step"], part["count"]) for part in resumed["segments"]] == [(0, 4), (13, 1)]
    loss = read_record(single_run["default"][1])["metrics"]["test"]["loss"]
    assert resumed["metrics"]["test"]["loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_devices_that_cannot_share_the_batch_are_refused(four_devices):
    batch, too_many, micro = four_devices[0]["refused"]
    assert re.match(
        r"trainer.batch_size=6 \(the global batch\) must be a multiple of the 4 devices", batch
    )
    assert re.match(r"trainer.devices=5: this process has 4 .*take at most 4", too_many)
    assert (
        "trainer.micro_batch=1 must be a divisor of trainer.batch_size=9 and a multiple of the 3 "
        "devices" in micro
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stu", "s4d", "mega", "transformer"])
def test_no_device_gathers_the_examples_of_others(four_devices, model):
    """The partitioner would do so for an FFT and for some reshapes: correct, but not faster."""
    reductions, gathers = four_devices[0]["collectives"][model]
    assert reductions > 0
    assert gathers == 0


def test_one_device_has_no_mesh():
    devices = DataParallel()
    tree = {"x": np.ones(3)}
    assert devices.num_devices == devices.num_local_devices == 1
    assert devices.replicate(tree) is tree
    assert devices.shard_batch(tree) is devices.replicate_under_jit(tree) is tree
    assert devices.round_up(7) == 7


def test_devices_are_not_part_of_the_identity(tiny):
    name = folder_of(tiny).name
    assert folder_of([*tiny, "trainer.devices=1", "data.placement=host"]).name == name
