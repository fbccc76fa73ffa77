"""Measurements of `lra bench data`, `ops` and `trainer`: record, JSON file, Markdown table."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from lra.files import write_atomically
from lra.runs.machine import cores, cpu_name, git_commit, versions


class Measurement(NamedTuple):
    """One measured number and its goal."""

    what: str
    value: float | None  # None: not measured; `note` gives the reason
    unit: str
    goal: str
    note: str = ""


def make_result(suite: str, measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Returns the JSON record of a suite: measurements, commit, versions, machine."""
    machine: dict[str, Any] = {"cpu": cpu_name(), "cores": cores(), "system": platform.system()}
    if suite != "data":  # which needs no JAX
        import jax

        machine["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "suite": suite,
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine,
        "measurements": [m._asdict() for m in measurements],
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the measurements as a Markdown table, with the machine and the versions below it."""
    rows = []
    for m in result["measurements"]:
        value = "not measured" if m["value"] is None else f"{m['value']:,.4g} {m['unit']}"
        rows.append([m["what"], value, m["goal"], m["note"]])
    machine, software = result["machine"], result["versions"]
    device = f"{machine['device']}, " if "device" in machine else ""
    return (
        tabulate(rows, headers=["what", "measured", "goal", "note"], tablefmt="pipe")
        + f"\n\n{device}{machine['cpu']}, {machine['cores']} cores, commit {result['commit']}, "
        f"Python {software['python']}, NumPy {software['numpy']}, JAX {software['jax']}\n"
    )


def save(result: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())


def format_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_bytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
