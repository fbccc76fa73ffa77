"""`train(cfg)`: starts the processes, opens the run's folder, runs the trainer, records errors."""

import time
from functools import partial
from typing import Any

from omegaconf import DictConfig

from lra.config.compose import run_config, to_container
from lra.config.schema import check_config
from lra.errors import LraError
from lra.runs import records
from lra.training import distributed
from lra.training.data_parallel import choose_devices
from lra.training.memory import is_out_of_memory, out_of_memory_advice
from lra.training.micro_batch import check_micro_batch
from lra.training.preemption import Signals
from lra.training.recorder import Recorder, previous_record
from lra.training.setup import Setup, check_compatible, use_compilation_cache
from lra.training.trainer import Trainer


def train(cfg: DictConfig) -> dict[str, Any]:
    """Trains the model of a config and returns the record of the run.

    The run's folder holds record, metrics, predictions and checkpoints.

    Raises:
        LraError: bad config or data, a folder in use, a diverged loss, an interruption. The record
            holds the error.
    """
    started = time.monotonic()
    config = run_config(cfg)
    check_config(config)  # again, because a composed config may have been edited
    check_compatible(cfg)
    distributed.initialize(cfg)  # before JAX creates its devices
    distributed.check_same_config(cfg)
    if cfg.trainer.compilation_cache:
        use_compilation_cache()
    devices = choose_devices(cfg)
    check_micro_batch(cfg, devices.num_devices)
    setup = Setup(cfg)  # finds most config errors before a folder is made
    path = records.run_path(cfg.output.root, config, to_container(cfg.names))
    with distributed.open_run_folder(path) as folder:
        previous = distributed.broadcast(partial(previous_record, folder, config, cfg.resume))
        if previous.get("status") == "finished":
            return previous
        recorder = Recorder(
            cfg,
            folder,
            previous,
            num_classes=setup.task.num_classes,
            groups=setup.groups,
            num_devices=devices.num_devices,
            started=started,
        )
        try:
            with Signals() as signals, signals.sigterm_preempts():
                Trainer(cfg, setup, devices, recorder).run(signals)
        except BaseException as caught:
            error = distributed.lost_peer_error(caught) or caught
            recorder.fail(error)
            if is_out_of_memory(error):
                advice = out_of_memory_advice(cfg, recorder.record["micro_batch"])
                raise LraError(advice) from error
            if error is not caught:
                raise error from caught
            raise
        # JAX aborts processes that wait at exit for too long. Not inside the block above: a process
        # that is lost now must not turn a finished run into a preempted one.
        distributed.all_gather(None)
        return recorder.record
