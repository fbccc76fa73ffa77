"""`lra bench efficiency`: time and memory of each model at each sequence length.

The modern form of the LRA paper's table. A cell, one model at one length, is measured in a process
of its own. Finished cells are kept in a JSON file and are measured again only if the config, the
device or the versions change.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lra.bench.efficiency_cell import device_facts, run_cell
from lra.bench.efficiency_table import make_table
from lra.config.compose import compose
from lra.config.messages import nearest, translated_errors
from lra.config.options import CONF, options
from lra.errors import ConfigError, LraError
from lra.files import disk_errors, write_atomically
from lra.report.formats import render
from lra.report.plots import plot_efficiency
from lra.runs.machine import git_commit, versions
from lra.runs.records import to_json
from lra.training.micro_batch import check_micro_batch
from lra.training.setup import check_compatible

RENAMED = {"model": "models=[A,B]", "seq_len": "seq_lens=[N,M]", "limit": "limit_s=SECONDS"}


@dataclass
class Settings:
    """Types of the keys of conf/bench/efficiency.yaml, which holds the defaults."""

    models: list[str] | None
    seq_lens: list[int] | None
    batch_size: int | None
    baseline: str | None
    seconds: float
    limit_s: float
    train: list[str]
    about: str | None
    published: dict[str, str] | None
    cells: dict[str, Any] | None


class Cell(NamedTuple):
    """A measurement to make: its place in the table and its config."""

    row: str
    column: str
    overrides: list[str]  # as for `lra train`
    published: float | None = None  # published training steps/s


def compose_settings(words: Sequence[str]) -> Settings:
    """Composes conf/bench/efficiency.yaml with Hydra.

    Args:
        words: Hydra overrides; those that begin with `train.` are appended to `train`.
    Raises:
        ConfigError: an unknown key or name, or a value of the wrong type or range.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    own = [word for word in words if not word.startswith("train.")]
    check_words(own)
    GlobalHydra.instance().clear()
    folder = str(CONF / "bench")
    with translated_errors(own), hydra.initialize_config_dir(folder, version_base="1.3"):
        cfg = hydra.compose("efficiency", overrides=own)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Settings), cfg)
    except OmegaConfBaseException as error:
        value = OmegaConf.select(cfg, error.full_key or "")
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}={value} is not valid: {reason}") from error
    settings = cast(Settings, OmegaConf.to_object(typed))
    settings.train += train_overrides(words)
    check_settings(settings)
    return settings


def train_overrides(words: Sequence[str]) -> list[str]:
    return [word.removeprefix("train.") for word in words if word.startswith("train.")]


def check_words(words: Sequence[str]) -> None:
    """Raises ConfigError for a word that is no KEY=VALUE of conf/bench/efficiency.yaml."""
    keys = ["preset", *(field.name for field in fields(Settings))]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(
                f"{word}: expected KEY=VALUE, such as models=[stu,lru] train.backbone.width=64"
            )
        if key in RENAMED:
            raise ConfigError(f"{word}: {key}= is now {RENAMED[key]}")
        if key not in keys:
            raise ConfigError(
                f"unknown key {key}{nearest(key, keys)}; expected one of {', '.join(keys)}, "
                f"or train.{key} for a key of the trained config"
            )
        if key in ("models", "seq_lens") and not value.startswith("[") and value != "null":
            raise ConfigError(f"{word}: expected a list, {key}=[{value}]")
        if key == "preset" and value not in (known := options("bench/preset")):
            raise ConfigError(f"{word} is unknown; choose one of {', '.join(known)}")


def check_settings(settings: Settings) -> None:
    known = options("model")
    for name in settings.models or known:
        if name not in known:
            raise ConfigError(f"models: {name} is unknown; choose of {', '.join(known)}")
    if settings.cells:
        for key in ("seq_lens", "batch_size", "baseline"):
            if getattr(settings, key) is not None:
                raise ConfigError(f"a preset fixes {key}; drop {key}={getattr(settings, key)}")
    elif settings.batch_size is None or not settings.seq_lens:
        raise ConfigError("batch_size and seq_lens must not be null without a preset")
    for key, values in (("seq_lens", settings.seq_lens), ("batch_size", [settings.batch_size])):
        if any(value is not None and value < 1 for value in values or []):
            raise ConfigError(f"{key}={getattr(settings, key)} must be at least 1")
    for key in ("seconds", "limit_s"):
        if not 0 < getattr(settings, key) < float("inf"):
            raise ConfigError(f"{key}={getattr(settings, key)} must be a number of seconds above 0")


def make_cells(settings: Settings) -> list[Cell]:
    """Returns the cells, row by row: models x lengths, or models x cells of the preset."""
    names = list(dict.fromkeys(settings.models or options("model")))
    if settings.cells is None:
        fixed = [f"trainer.batch_size={settings.batch_size}", *settings.train]
        return [
            Cell(name, str(length), [*fixed, f"model={name}", f"task.seq_len={length}"])
            for name in names
            for length in dict.fromkeys(settings.seq_lens or [])
        ]
    cells = []
    for name in names:
        is_published = settings.published is not None and name == settings.published["model"]
        for task, cell in settings.cells.items():
            model_overrides = cell.get("model_overrides", []) if is_published else []
            overrides = [*cell["train"], f"model={name}", *model_overrides, *settings.train]
            speed = cell["steps_per_s"] if is_published else None
            cells.append(Cell(f"{name}, {task}", "", overrides, speed))
    return cells


def compose_cells(cells: Sequence[Cell]) -> list[DictConfig | ConfigError]:
    """Returns the config of each cell, or its error. Raises the first error if all have one."""
    configs: list[DictConfig | ConfigError] = []
    for cell in cells:
        try:
            cfg = compose(cell.overrides)
            check_compatible(cfg)
            check_micro_batch(cfg, 1)
            if cfg.trainer.micro_batch == "auto":
                raise ConfigError(
                    "trainer.micro_batch=auto is for training; set it to a number or null"
                )
            configs.append(cfg)
        except ConfigError as error:
            configs.append(error)
    if all(isinstance(cfg, ConfigError) for cfg in configs):
        raise ConfigError(str(configs[0]))
    return configs


def make_caption(settings: Settings, words: Sequence[str], cfg: DictConfig) -> list[str]:
    """Returns the lines below the table that describe the configs, of which `cfg` is one."""
    if settings.about:
        caption = [
            f"{settings.about[0].upper()}{settings.about[1:]}; random inputs of full length."
        ]
    else:
        caption = [
            f"{cfg.names.task}, protocol {cfg.names.protocol}, random inputs of full length; "
            f"batch {cfg.trainer.batch_size}, depth {cfg.backbone.depth}, "
            f"width {cfg.backbone.width}, {cfg.trainer.precision}, remat {cfg.trainer.remat}; "
            f"each model in its own block (`recipe`)."
        ]
    if settings.published:
        caption.append(f"Published training steps/s: {settings.published['source']}.")
    if train := train_overrides(words):
        caption.append(f"Also set: {' '.join(train)}.")
    return caption


def run(words: Sequence[str], file: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Measures the cells that `file` lacks, or all if `fresh`; returns the record with all cells.

    Prints a line after each cell. Writes the table as .md and .tex and, over lengths, the plot as
    .png beside the file.

    Raises:
        ConfigError: see `compose_settings`; or no cell has a valid config.
        LraError: `file` holds something else.
    """
    settings = compose_settings(words)
    cells = make_cells(settings)
    configs = compose_cells(cells)
    device = device_facts()
    kept = {} if fresh else read_cells(file)
    first = next(cfg for cfg in configs if isinstance(cfg, DictConfig))
    result: dict[str, Any] = {
        "suite": "efficiency",
        "command": shlex.join(["lra", "bench", "efficiency", *words]),
        "commit": git_commit(),
        "versions": versions(),
        "machine": device,
        "caption": make_caption(settings, words, first),
        "baseline": settings.baseline,
        "preset": settings.about,
        "cells": [],
    }
    with disk_errors(file, "--output"):
        file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any]
    for number, (cell, cfg) in enumerate(zip(cells, configs, strict=True), 1):
        if isinstance(cfg, ConfigError):
            key, suffix = str(cell.overrides), ""
            found = {"key": key, "status": "failed", "reason": str(cfg), "commit": git_commit()}
        elif earlier := kept.get(key := cell_hash(cfg, device, settings.seconds)):
            found, suffix = earlier, "  measured before"
        else:
            start = time.monotonic()
            found = {"key": key, "commit": git_commit()}
            found |= run_cell(cell.overrides, settings.seconds, settings.limit_s)
            if hasattr(os, "getloadavg"):  # other programs slow the measurement down
                found["load"] = round(os.getloadavg()[0], 1)
            suffix = f"  {time.monotonic() - start:.0f} s"
        print(f"{number}/{len(cells)} {describe(cell, found)}{suffix}", flush=True)
        place = {"row": cell.row, "column": cell.column, "published": cell.published}
        result["cells"].append(found | place)
        # Keep earlier cells that are not reached yet, in case of an interruption.
        done = {cell["key"] for cell in result["cells"]}
        others = [other for key, other in kept.items() if key not in done]
        content = json.dumps(to_json(result | {"others": others}), indent=1, allow_nan=False)
        write_atomically(file, (content + "\n").encode())
    write_tables(result, file)
    return result


def write_tables(result: dict[str, Any], file: Path) -> None:
    table = make_table(result)
    write_atomically(file.with_suffix(".md"), render(table, "markdown").encode())
    write_atomically(file.with_suffix(".tex"), render(table, "latex").encode())
    if not result["preset"]:
        plot_efficiency(result["cells"], file.with_suffix(".png"))


def read_cells(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the finished cells of an earlier command by hash: results and OOM, no failures."""
    if not file.exists():
        return {}
    try:
        result = json.loads(file.read_text())
        if result["suite"] != "efficiency":
            raise KeyError("suite")
        cells = [*result["cells"], *result["others"]]
        return {cell["key"]: cell for cell in cells if cell["status"] in ("ok", "oom")}
    except (ValueError, KeyError, TypeError) as error:
        raise LraError(
            f"{file} holds no efficiency table; choose another --output, or --fresh to replace it"
        ) from error


def cell_hash(cfg: DictConfig, device: Mapping[str, Any], seconds: float) -> str:
    """Returns the hash of everything that a measurement depends on: config, device, versions."""
    config: Any = OmegaConf.to_container(cfg)
    parts = {key: config[key] for key in ("task", "model", "backbone", "optim", "protocol")}
    keys = ("batch_size", "precision", "remat", "micro_batch", "deterministic")
    trainer = {key: config["trainer"][key] for key in keys}
    text = json.dumps(to_json([parts, trainer, device, versions(), seconds]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(cell: Cell, found: Mapping[str, Any]) -> str:
    name = f"{cell.row} {cell.column}".strip()
    if found["status"] != "ok":
        return f"{name}: {found['status'].upper()}, {found['reason']}"
    return (
        f"{name}: train {found['train']['steps_per_s']:.3g} steps/s, "
        f"infer {found['infer']['steps_per_s']:.3g} steps/s, "
        f"{found['memory']['train_bytes'] / 1e9:.3g} GB"
    )
