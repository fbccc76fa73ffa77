"""Builds the task of a file in conf/task without the rest of the configuration."""

import functools
from collections.abc import Mapping
from pathlib import Path

from hydra.utils import get_class
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


@functools.cache
def _loaded(group, name):
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def configured_task(name, protocol="strict", data_root="unused", **changes):
    """The task `name` with some arguments changed; `protocol` is a name or a mapping."""
    if not isinstance(protocol, Mapping):
        protocol = _loaded("protocol", protocol)
    arguments = {key: value for key, value in _loaded("task", name).items() if key != "hparams"}
    task_class = get_class(arguments.pop("_target_"))
    return task_class(protocol=protocol, data_root=data_root, **(arguments | changes))
