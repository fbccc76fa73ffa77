"""`lra doctor`: versions, devices, prepared data and W&B state, for bug reports."""

from pathlib import Path

from lra.runs.machine import git_commit, versions


def report(data_root: Path) -> str:
    """One line `name: finding` for each subject."""
    import jax

    from lra.runs.tracking import doctor_line

    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in versions().items())
    devices = ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
    lines = {
        "versions": packages,
        "commit": git_commit() or "not in a checkout",
        "devices": devices,
        "data": "; ".join(stores(data_root))
        or f"nothing prepared under {data_root}; run `lra data prepare TASK`",
        "W&B": doctor_line(),
    }
    return "\n".join(f"{name + ':':<10}{finding}" for name, finding in lines.items())


def stores(data_root: Path) -> list[str]:
    """For each packed store its folder and counts, or its error."""
    from lra.data.store import open_store
    from lra.errors import DataError

    found: list[str] = []
    for manifest in sorted(data_root.glob("packed/*/manifest.json")):
        try:
            splits = open_store(manifest.parent).splits
            counts = ", ".join(f"{name} {len(split):,}" for name, split in splits.items())
            found.append(f"{manifest.parent} ({counts})")
        except DataError as error:
            found.append(str(error))
    return found
