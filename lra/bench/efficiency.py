"""What does a model cost in time and memory as sequences grow? `lra bench efficiency`, the modern form of the LRA paper's table.

A cell is one model at one length. It is measured in a process of its own, so that its peak memory is its own and running out of
it is a result. Finished cells are kept in the JSON file and are not measured again while model, config, device and versions stay.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from lra.config.compose import compose
from lra.config.options import CONF, options
from lra.errors import ConfigError, LraError
from lra.files import disk_errors, write_atomically
from lra.report.formats import Table, TableRow, render
from lra.runs.machine import git_commit, versions
from lra.runs.records import to_json

# the LRA paper's: Text, its first four lengths; no data are needed, inputs are random bytes
TASK = ("task=text", "protocol=lra2020")
LENGTHS = (1024, 2048, 3072, 4096, 8192, 16384)
BATCH_SIZE = 32
SECONDS = 1.0  # of one measured window
WINDOWS = 5
LIMIT_S = 1800.0  # of a cell
WORDS = ("model", "seq_len", "batch_size", "preset", "baseline", "seconds", "limit")


class Cell(NamedTuple):
    """What is measured, before it is: a row and a column of the table, and the config."""

    row: str
    column: str
    overrides: list[str]  # as for `lra train`
    published: float | None = None  # training steps/s that somebody else reports


class Plan(NamedTuple):
    """What a command line asks for."""

    cells: list[Cell]
    configs: "list[DictConfig | ConfigError]"  # of the cells, or why there is none
    caption: list[str]
    baseline: str | None  # the row that others are multiples of
    preset: Mapping[str, Any] | None
    seconds: float
    limit: float


def plan(words: Sequence[str]) -> Plan:
    """What `lra bench efficiency WORDS` measures.

    Args:
        words: model=A,B seq_len=N,M batch_size=N, or preset=NAME and model=A,B; baseline=MODEL; seconds=S of a measured window;
            limit=S of a cell; all others as for `lra train`.
    Raises:
        ConfigError: a word that is none of them, an unknown model or preset, or a number that is none.
    """
    if stray := [word for word in words if "=" not in word]:
        raise ConfigError(
            f"{stray[0]}: expected KEY=VALUE words, such as model=stu,lru seq_len=1024,2048 backbone.width=64"
        )
    given = {
        key: value for key, _, value in (word.partition("=") for word in words) if key in WORDS
    }
    others = [word for word in words if word.partition("=")[0] not in WORDS]
    seconds, limit = (
        _number(key, given.get(key, default))
        for key, default in (("seconds", SECONDS), ("limit", LIMIT_S))
    )
    if "preset" in given:
        return _preset(given, others, seconds, limit)
    from models.benchmarks import BASELINE

    names = _models(given.get("model") or ",".join(options("model")))
    lengths = [_whole("seq_len", text) for text in _words(given, "seq_len", LENGTHS)]
    batch = _whole("batch_size", given.get("batch_size", str(BATCH_SIZE)))
    task = [] if any(word.startswith("task=") for word in others) else list(TASK)
    shared = [*task, f"trainer.batch_size={batch}", *others]
    cells = [
        Cell(name, str(length), [*shared, f"model={name}", f"task.seq_len={length}"])
        for name in names
        for length in lengths
    ]
    configs = composed(cells)
    cfg = next(cfg for cfg in configs if isinstance(cfg, DictConfig))
    caption = [
        f"{cfg.names.task}, protocol {cfg.names.protocol}, random inputs of full length; batch {batch}, depth "
        f"{cfg.backbone.depth}, width {cfg.backbone.width}, {cfg.trainer.precision}, remat {cfg.trainer.remat}; each model "
        f"in its own block (`recipe`).",
        *([f"Also set: {' '.join(others)}."] if others else []),
    ]
    return Plan(cells, configs, caption, given.get("baseline", BASELINE), None, seconds, limit)


def _preset(given: dict[str, str], others: list[str], seconds: float, limit: float) -> Plan:
    """A file of conf/efficiency/: a cell a task, with what somebody else reports for one of the models."""
    known = options("efficiency")
    if given["preset"] not in known:
        raise ConfigError(f"preset={given['preset']} is unknown; choose one of {', '.join(known)}")
    if fixed := [key for key in ("seq_len", "batch_size", "baseline") if key in given]:
        raise ConfigError(
            f"preset={given['preset']} fixes {fixed[0]}; drop {fixed[0]}={given[fixed[0]]}"
        )
    preset: Any = OmegaConf.to_container(
        OmegaConf.load(CONF / "efficiency" / f"{given['preset']}.yaml")
    )
    cells = []
    for name in _models(given.get("model", preset["model"])):
        own = name == preset["model"]
        for task, cell in preset["cells"].items():
            words = [
                *cell["overrides"],
                f"model={name}",
                *(cell.get("model_overrides", []) if own else []),
            ]
            cells.append(
                Cell(f"{name}, {task}", "", [*words, *others], cell["steps_per_s"] if own else None)
            )
    caption = [f"{preset['about'][0].upper()}{preset['about'][1:]}; random inputs of full length."]
    caption += [f"Published training steps/s: {preset['reference']}."]
    caption += [f"Also set: {' '.join(others)}."] if others else []
    return Plan(cells, composed(cells), caption, None, preset, seconds, limit)


def composed(cells: Sequence[Cell]) -> "list[DictConfig | ConfigError]":
    """The config of each cell, or what is wrong with it.

    Raises:
        ConfigError: none has a config.
    """
    from lra.training.micro_batch import check_micro_batch
    from lra.training.trainer import check

    configs: list[DictConfig | ConfigError] = []
    for cell in cells:
        try:
            cfg = compose(cell.overrides)
            check(cfg)
            check_micro_batch(cfg, 1)
            if cfg.trainer.micro_batch == "auto":
                raise ConfigError(
                    "trainer.micro_batch=auto is for training; a table states one, a number or null"
                )
            configs.append(cfg)
        except ConfigError as error:
            configs.append(error)
    if all(isinstance(cfg, ConfigError) for cfg in configs):
        raise ConfigError(str(configs[0]))
    return configs


def _words(given: Mapping[str, str], key: str, default: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys((given.get(key) or ",".join(map(str, default))).split(",")))


def _models(text: str) -> list[str]:
    names, known = list(dict.fromkeys(text.split(","))), options("model")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"model={unknown[0]} is unknown; choose of {', '.join(known)}")
    return names


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text} must be a whole number of at least 1")
    return int(text)


def _number(key: str, text: str | float) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise ConfigError(f"{key}={text} must be a number of seconds above 0")


# --- the table's story -----------------------------------------------------------------------------------------------


def run(
    words: Sequence[str], file: Path, *, fresh: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure the cells that `file` does not hold yet; returns all of them, as they then stand there.

    Beside the file, of the same name: the table as .md and .tex, the plot as .png.

    Raises:
        ConfigError: see `plan`; or a config that no model takes.
        LraError: `file` holds something else.
    """
    wanted = plan(words)
    device = _device()
    kept = {} if fresh else _kept(file)
    result: dict[str, Any] = {
        "suite": "efficiency",
        "command": " ".join(["lra bench efficiency", *words]),
        "commit": git_commit(),
        "versions": versions(),
        "machine": device,
        "caption": wanted.caption,
        "baseline": wanted.baseline,
        "preset": wanted.preset
        and {key: wanted.preset[key] for key in ("about", "model", "reference")},
        "cells": [],
    }
    with disk_errors(file, "--output"):
        file.parent.mkdir(parents=True, exist_ok=True)
    for number, (cell, cfg) in enumerate(zip(wanted.cells, wanted.configs, strict=True), 1):
        key = (
            identity(cfg, device, wanted.seconds)
            if isinstance(cfg, DictConfig)
            else str(cell.overrides)
        )
        found = kept.get(key)
        if not isinstance(cfg, DictConfig):
            found = {"key": key, "commit": git_commit(), "status": "failed", "reason": str(cfg)}
            say(f"{number}/{len(wanted.cells)} {_told(cell, found)}")
        elif found is None:
            start = time.monotonic()
            found = {
                "key": key,
                "commit": git_commit(),
                **measured(cell, wanted.seconds, wanted.limit),
            }
            if hasattr(os, "getloadavg"):
                found["load"] = round(
                    os.getloadavg()[0], 1
                )  # who reads the speeds wants to know what else ran
            say(
                f"{number}/{len(wanted.cells)} {_told(cell, found)}  {time.monotonic() - start:.0f} s"
            )
        else:
            say(f"{number}/{len(wanted.cells)} {_told(cell, found)}  measured before")
        place = {"row": cell.row, "column": cell.column, "published": cell.published}
        result["cells"].append({**found, **place})
        # what an earlier command measured and this one has not come to yet stays, should this one be interrupted
        rest = [
            other
            for name, other in kept.items()
            if name not in {done["key"] for done in result["cells"]}
        ]
        _write(file, result | {"others": rest})
    write_all(result, file)
    return result


def write_all(result: dict[str, Any], file: Path) -> None:
    """The table as Markdown and LaTeX and the plot, beside the JSON."""
    from lra.report.plots import plot_efficiency

    table = make_table(result)
    write_atomically(file.with_suffix(".md"), render(table, "markdown").encode())
    write_atomically(file.with_suffix(".tex"), render(table, "latex").encode())
    if not result["preset"]:
        plot_efficiency(result["cells"], file.with_suffix(".png"))


def _write(file: Path, result: dict[str, Any]) -> None:
    write_atomically(file, (json.dumps(to_json(result), indent=1, allow_nan=False) + "\n").encode())


def _kept(file: Path) -> dict[str, dict[str, Any]]:
    """Cells by their identity that an earlier command left; those that failed for no lack of memory are tried again."""
    if not file.exists():
        return {}
    try:
        before = json.loads(file.read_text())
        cells = [*before["cells"], *before["others"]] if before["suite"] == "efficiency" else None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        cells = None
    if cells is None:
        raise LraError(
            f"{file} holds no efficiency table to go on with; choose another --output, or --fresh"
        )
    return {cell["key"]: cell for cell in cells if cell["status"] in ("ok", "oom")}


def identity(cfg: DictConfig, device: Mapping[str, Any], seconds: float) -> str:
    """Hash of what a measurement depends on: resolved config, device, versions."""
    from lra.training.trainer import run_config

    config = run_config(cfg)
    parts = {key: config[key] for key in ("task", "model", "backbone", "optim", "protocol")}
    trainer = {
        key: config["trainer"][key]
        for key in ("batch_size", "precision", "remat", "micro_batch", "deterministic")
    }
    text = json.dumps(to_json([parts, trainer, device, versions(), seconds]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _device() -> dict[str, Any]:
    """The device, asked in another process: one that has looked at a GPU holds most of its memory."""
    from lra.runs.machine import cores, cpu_name

    done = subprocess.run(
        [sys.executable, "-m", "lra.bench.efficiency"], input="null", capture_output=True, text=True
    )
    if done.returncode:
        raise LraError(f"JAX finds no device: {_last_line(done.stderr)}")
    return {**json.loads(done.stdout.splitlines()[-1]), "cpu": cpu_name(), "cores": cores()}


def measured(cell: Cell, seconds: float, limit: float) -> dict[str, Any]:
    """`measure` in a process of its own; its end, whatever it is, is a result."""
    task = json.dumps({"overrides": cell.overrides, "seconds": seconds})
    command = [sys.executable, "-m", "lra.bench.efficiency"]
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    try:
        done = subprocess.run(
            command, input=task, capture_output=True, text=True, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took longer than limit={limit:g} seconds"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode == -signal.SIGKILL:
        return {"status": "oom", "reason": "killed by the system"}
    reason = _last_line(done.stderr)
    return {"status": "oom" if _is_oom(done.stderr) else "failed", "reason": reason}


def _is_oom(text: str) -> bool:
    from lra.training.memory import OUT_OF_MEMORY

    return bool(OUT_OF_MEMORY.search(text)) or "std::bad_alloc" in text


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else "ended without a word"


def _told(cell: Cell, found: Mapping[str, Any]) -> str:
    name = f"{cell.row} {cell.column}".strip()
    if found["status"] != "ok":
        return f"{name}: {found['status'].upper()}, {found['reason']}"
    return (
        f"{name}: train {found['train']['steps_per_s']:.3g} steps/s, infer {found['infer']['steps_per_s']:.3g} steps/s, "
        f"{found['memory']['train_bytes'] / 1e9:.3g} GB"
    )


# --- one cell, in its own process ------------------------------------------------------------------------------------


def measure(overrides: Sequence[str], seconds: float = SECONDS) -> dict[str, Any]:
    """Speed, memory and size of one config on random inputs of full length.

    Inference comes first: where the device keeps a peak, it is that of inference until training begins. Both are the trainer's
    own programs.
    """
    import jax

    from lra.config.cost import cost
    from lra.training.memory import compiled_bytes, device_bytes, in_gb, is_out_of_memory
    from lra.training.setup import Setup
    from lra.training.state import initial_state
    from lra.training.step import compile_program

    cfg = compose(overrides)
    device = jax.devices()[0]
    size = cost(cfg)
    facts = {
        "seq_len": 0,
        "batch_size": cfg.trainer.batch_size,
        "depth": size.depth,
        "width": size.width,
    }
    facts |= {"params": size.params, "flops": size.flops, "note": size.note}
    try:
        setup = Setup(cfg)
        facts["seq_len"] = setup.task.seq_len
        batch = random_batch(setup.task, cfg.trainer.batch_size)
        program = compile_program(setup, cfg.trainer.batch_size, cfg.trainer.micro_batch)
        compile_s, needs, peaks, rates = {}, {}, {}, {}

        def compiled(name: str, function: Any, *args: Any) -> Any:
            start = time.perf_counter()
            made = function.lower(*args).compile()
            compile_s[name] = time.perf_counter() - start
            needs[name] = compiled_bytes(made)
            free = (
                device_bytes(device) if device.platform == "cpu" else None
            )  # elsewhere the device itself refuses
            need = needs[name]
            if free is not None and need is not None and need > free:
                raise MemoryError(
                    f"{name} needs {in_gb(need)} by XLA's analysis, {in_gb(free)} are free"
                )
            return made

        def peak() -> int | None:
            return (device.memory_stats() or {}).get("peak_bytes_in_use")

        arguments = (setup.params, setup.batch_stats, setup.constants, batch.inputs, batch.lengths)
        apply = compiled("infer", program.apply, *arguments)

        def infer(count: int) -> None:
            for _ in range(count):
                logits = apply(*arguments)
            jax.block_until_ready(logits)

        rates["infer"] = rate(infer, seconds)
        peaks["infer"] = peak()
        del apply, arguments
        state, _ = initial_state(
            setup
        )  # only now: the optimizer's share is not part of an inference
        run_steps = compiled("train", program.run, state, setup.constants, batch, np.int32(0))
        held = [state]

        def train(count: int) -> None:
            state = held.pop()
            until = np.int32(int(state.step) + count)
            held.append(jax.block_until_ready(run_steps(state, setup.constants, batch, until)))

        rates["train"] = rate(train, seconds)
        peaks["train"] = peak()
    except MemoryError as error:
        return {"status": "oom", "reason": str(error) or "out of memory", **facts}
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "oom", "reason": " ".join(str(error).split())[:200], **facts}
    by_device = peaks["train"] is not None
    memory: dict[str, Any] = {
        f"{name}_bytes": (peaks if by_device else needs)[name] for name in ("train", "infer")
    }
    memory |= {"source": "device" if by_device else "compiled", "compiled": needs}
    speeds = {
        name: {
            "steps_per_s": value,
            "examples_per_s": value * cfg.trainer.batch_size,
            "compile_s": compile_s[name],
        }
        for name, value in rates.items()
    }
    return {"status": "ok", "reason": "", **facts, **speeds, "memory": memory}


def random_batch(task: Any, batch_size: int) -> Any:
    """`Examples` of one batch on the device: random ids or values at every position."""
    import jax
    import jax.numpy as jnp

    from lra.training.state import Examples

    rng = np.random.default_rng(0)
    pair = (2,) if task.dual else ()
    if task.num_tokens is not None:
        values = rng.integers(1, task.num_tokens, (batch_size, *pair, task.seq_len))
        inputs = values.astype(np.min_scalar_type(task.num_tokens - 1))
    else:
        features = (task.num_features,) if task.num_features > 1 else ()
        top = min(np.iinfo(task.value_dtype).max, 255)
        values = rng.integers(0, top, (batch_size, *pair, task.seq_len, *features), endpoint=True)
        inputs = values.astype(task.value_dtype)
    targets = (task.num_targets,) if task.num_targets > 1 else ()
    labels = rng.integers(0, task.num_classes, (batch_size, *targets)).astype(np.int32)
    lengths = np.full((batch_size, *pair), task.seq_len, np.int32)
    return Examples(
        *jax.device_put((jnp.asarray(inputs), jnp.asarray(lengths), jnp.asarray(labels)))
    )


def rate(call: Callable[[int], None], seconds: float) -> float:
    """Steps per second of `call(count)`: the fastest of a few windows of about so many seconds, after a warm-up.

    The fastest, since whatever else the machine does can only slow a window down.
    """
    call(1)
    start = time.perf_counter()
    call(1)
    once = time.perf_counter() - start
    count = max(1, round(seconds / once))
    windows: list[float] = []
    while (
        len(windows) < WINDOWS and time.perf_counter() - start < 2 * WINDOWS * seconds
    ):  # fewer of very long steps
        began = time.perf_counter()
        call(count)
        windows.append(count / (time.perf_counter() - began))
    return max(windows, default=1 / once)


def main() -> None:
    """A cell described on standard input, its result on the last line of standard output; `null` asks for the device."""
    import jax

    task = json.loads(sys.stdin.read())
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # how long a compilation takes is one of the results
    if task is None:
        device = jax.devices()[0]
        print(
            json.dumps(
                {
                    "platform": device.platform,
                    "kind": device.device_kind,
                    "count": jax.device_count(),
                }
            )
        )
        return
    try:
        print(json.dumps(to_json(measure(**task))))
    except (LraError, ValueError, TypeError, NotImplementedError) as error:
        print(
            json.dumps(
                {
                    "status": "failed",
                    "reason": " ".join(str(error).split())[:300] or type(error).__name__,
                }
            )
        )


# --- the table -------------------------------------------------------------------------------------------------------

# title, where the number stands in a cell, its factor, and whether less is better
QUANTITIES: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("Training, steps/s", ("train", "steps_per_s"), 1.0),
    ("Inference, steps/s", ("infer", "steps_per_s"), 1.0),
    ("Training, peak memory in GB", ("memory", "train_bytes"), 1e-9),
    ("Inference, peak memory in GB", ("memory", "infer_bytes"), 1e-9),
    ("Training, examples/s", ("train", "examples_per_s"), 1.0),
    ("Inference, examples/s", ("infer", "examples_per_s"), 1.0),
    ("Compilation of the training steps, s", ("train", "compile_s"), 1.0),
    ("Parameters, million", ("params",), 1e-6),
    ("Forward pass of one example, GFLOP", ("flops",), 1e-9),
)
RELATIVE = 4  # so many of them are also given as multiples of the baseline's


def make_table(result: Mapping[str, Any]) -> Table:
    """The result as `lra.report.tables` renders it: Markdown, LaTeX or text."""
    return _preset_table(result) if result["preset"] else _length_table(result)


def _length_table(result: Mapping[str, Any]) -> Table:
    columns = dict.fromkeys(cell["column"] for cell in result["cells"])
    table = Table({column: f"L={int(column):,}" for column in columns})
    base = {cell["column"]: cell for cell in result["cells"] if cell["row"] == result["baseline"]}
    for number, (title, path, factor) in enumerate(QUANTITIES):
        relative = number < RELATIVE and bool(base)
        rows: dict[str, TableRow] = {}
        for cell in result["cells"]:
            row = rows.setdefault(cell["row"], TableRow(cell["row"]))
            row.cells[cell["column"]] = _shown(
                table, cell, path, factor, base.get(cell["column"]) if relative else None
            )
        table.add_section(
            f"{title} (times that of {result['baseline']})" if relative else title, rows.values()
        )
    _remarks(table, result)
    return table


def _preset_table(result: Mapping[str, Any]) -> Table:
    """A row a task, a column a quantity, the published speed beside ours."""
    titles = [
        "B",
        "L",
        "published steps/s",
        "ours / published",
        *(title for title, *_ in QUANTITIES),
    ]
    table = Table({title: title for title in titles})
    rows = []
    for cell in result["cells"]:
        row = TableRow(cell["row"])
        for title, path, factor in QUANTITIES:
            row.cells[title] = _shown(table, cell, path, factor, None)
        row.cells |= {"B": str(cell.get("batch_size", "")), "L": f"{cell.get('seq_len', 0):,}"}
        if cell["published"]:
            row.cells["published steps/s"] = f"{cell['published']:g}"
            if cell["status"] == "ok":
                row.cells["ours / published"] = (
                    f"{cell['train']['steps_per_s'] / cell['published']:.3g} x"
                )
        rows.append(row)
    table.add_section("One model, one task a row", rows)
    _remarks(table, result)
    return table


def _shown(
    table: Table,
    cell: Mapping[str, Any],
    path: Sequence[str],
    factor: float,
    base: Mapping[str, Any] | None,
) -> str:
    value = _value(cell, path)
    if value is None:
        if cell["status"] == "ok":
            return "-" + (table.add_footnote(cell["note"]) if cell.get("note") else "")
        return ("OOM" if cell["status"] == "oom" else "-") + table.add_footnote(
            f"{cell['row']}: {cell['reason']}"
        )
    text = f"{value * factor:,.3g}" if value * factor < 1000 else f"{value * factor:,.0f}"
    other = _value(base, path) if base else None
    return f"{text} ({value / other:.2g} x)" if other else text


def _value(cell: Mapping[str, Any], path: Sequence[str]) -> int | float | None:
    found: Any = cell
    for key in path:
        found = (found or {}).get(key)
    return found


def _remarks(table: Table, result: Mapping[str, Any]) -> None:
    machine, version = result["machine"], result["versions"]
    sources = {cell["memory"]["source"] for cell in result["cells"] if cell["status"] == "ok"}
    says = {
        "device": "the device's own count (`peak_bytes_in_use`)",
        "compiled": "what the compiled program needs (XLA's analysis), as this device does not count",
    }
    commits = sorted({str(cell["commit"]) for cell in result["cells"]})
    table.remarks += result["caption"]
    if sources:
        table.remarks.append(
            f"Peak memory: {' or '.join(says[source] for source in sorted(sources))}."
        )
    loads = [cell["load"] for cell in result["cells"] if "load" in cell]
    load = (
        f", load average {min(loads):g} to {max(loads):g} (1 if nothing else runs)" if loads else ""
    )
    table.remarks.append(
        f"Steps/s: the fastest of {WINDOWS} windows. One {machine['kind']} device of {machine['count']}; {machine['cpu']}, "
        f"{machine['cores']} cores{load}; commit {' and '.join(commits)}, JAX {version['jax']}."
    )
    table.remarks.append(f"Command: {result['command']}.")


if __name__ == "__main__":
    main()
