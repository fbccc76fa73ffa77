"""`lra doctor`: versions, devices, prepared data and W&B state, for bug reports."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf

from lra.config.options import CONF, options
from lra.data.packed import open_store
from lra.errors import DataError
from lra.runs.machine import git_commit, versions
from lra.runs.tracking import doctor_line
from lra.sources.locate import find_archive, locate
from lra.sources.tfds_reader import find_tfds


def report(data_root: Path) -> str:
    """One line `name: finding` for each subject; the data are counts or the error of each store."""
    stores = []
    for manifest in sorted(data_root.glob("packed/*/manifest.json")):
        try:
            store = open_store(manifest.parent)
            counts = ", ".join(f"{name} {len(split):,}" for name, split in store.splits.items())
            stores.append(f"{manifest.parent} ({protocols(store.manifest)}{counts})")
        except DataError as error:
            stores.append(str(error))
    lines = {
        "versions": ", ".join(f"{name} {found or 'missing'}" for name, found in versions().items()),
        "commit": git_commit() or "not in a checkout",
        "devices": ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()),
        "data": "; ".join(stores)
        or f"nothing prepared under {data_root}; run `lra data prepare TASK`",
        "files": published_files(data_root),
        "W&B": doctor_line(),
    }
    return "\n".join(f"{name + ':':<10}{finding}" for name, finding in lines.items())


def protocols(manifest: Mapping[str, Any]) -> str:
    """Names the protocols with the inputs and the validation of a store.

    Empty for pictures and synthetic tasks, whose inputs are not named after a protocol's.
    """
    made = {"inputs": manifest["inputs"], **manifest["fingerprint"]}
    names = [
        name
        for name in options("protocol")
        if all(
            value == made.get(key, value)
            for key, value in OmegaConf.load(CONF / "protocol" / f"{name}.yaml").items()
            if key in ("inputs", "validation")
        )
    ]
    return f"protocol {' or '.join(names)}: " if names else ""


def published_files(data_root: Path) -> str:
    """The folder or archive that each task with published files would be prepared from."""
    found: dict[str, list[str]] = {}
    for name in options("task"):
        target = OmegaConf.select(OmegaConf.load(CONF / "task" / f"{name}.yaml"), "_target_")
        module, _, cls = target.rpartition(".")
        task = getattr(import_module(module), cls)
        if task.publisher is None:  # generated, unless task.source says otherwise
            continue
        path = (
            locate(task.publisher, data_root)
            or (task.tfds_name and find_tfds(data_root, task.tfds_name))
            or find_archive(task.publisher, data_root)
        )
        found.setdefault(str(path or f"none under {data_root}"), []).append(name)
    return "; ".join(f"{', '.join(names)}: {path}" for path, names in found.items())
