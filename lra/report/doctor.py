"""`lra doctor`: versions, devices, prepared data and W&B state, for bug reports."""

from pathlib import Path

import jax

from lra.data.packed import open_store
from lra.errors import DataError
from lra.runs.machine import git_commit, versions
from lra.runs.tracking import doctor_line


def report(data_root: Path) -> str:
    """One line `name: finding` for each subject; the data are counts or the error of each store."""
    stores = []
    for manifest in sorted(data_root.glob("packed/*/manifest.json")):
        try:
            splits = open_store(manifest.parent).splits
            counts = ", ".join(f"{name} {len(split):,}" for name, split in splits.items())
            stores.append(f"{manifest.parent} ({counts})")
        except DataError as error:
            stores.append(str(error))
    lines = {
        "versions": ", ".join(f"{name} {found or 'missing'}" for name, found in versions().items()),
        "commit": git_commit() or "not in a checkout",
        "devices": ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()),
        "data": "; ".join(stores)
        or f"nothing prepared under {data_root}; run `lra data prepare TASK`",
        "W&B": doctor_line(),
    }
    return "\n".join(f"{name + ':':<10}{finding}" for name, finding in lines.items())
