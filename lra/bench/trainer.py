"""`lra bench trainer`: `lra train` beside a bare jitted training step; the time of a start."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from omegaconf import OmegaConf

import lra
from lra.bench.measurement import Measurement, format_seconds
from lra.config.build import build_task, data_arguments
from lra.config.compose import compose
from lra.data.store import Split, Store, prepare
from lra.errors import ConfigError, LraError
from lra.runs.records import read_metrics, read_predictions
from lra.training.setup import Setup
from lra.training.state import Examples
from lra.training.step import cross_entropy, epoch_order, matmul_precision
from models import benchmarks

ROUNDS = 5
STEPS = 50  # of a round, for the config on the command line
SIZES = "task.sizes={train: 512, val: 64, test: 64}"
COMMON = (SIZES, "trainer.progress=false", "tracker.wandb=off")
TRAIN = ("trainer.devices=1", "trainer.first_loss_tolerance=null", "trainer.chance_after=null")
START = ("debug=tiny", "trainer.steps=1")
# The bare step and the trainer sum in different orders, and training amplifies the difference.
LOSS_TOLERANCE = 0.01
LOGITS_TOLERANCE = 0.1


class Outcome(NamedTuple):
    """Result of a training, to compare two of them."""

    loss: float  # mean training loss over all steps
    logits: np.ndarray  # (n, C) of the test split after the last step


Variant = Callable[[], tuple[float, Outcome]]  # trains; returns the seconds per step


def measure(overrides: Sequence[str] = ()) -> Iterator[Measurement]:
    """Measures training steps, then two starts.

    Args:
        overrides: config to train, as for `lra train`. Empty: the cases of `models.benchmarks`.
    """
    given = benchmarks.TrainerCase("as given", tuple(overrides), STEPS)
    for case in [given] if overrides else benchmarks.trainer_cases(jax.default_backend()):
        seconds = compare(case.overrides, case.steps)
        bare, device = seconds["bare_steps"], seconds["device"]
        shown = {name: format_seconds(value) for name, value in seconds.items()}
        note = f"{case.steps} steps a round: {shown['device']} a step, bare {shown['bare_steps']}"
        what = f"{case.what}: trainer / bare steps"
        yield Measurement(what, device / bare, "x", "<= 1.05 x", note)
        note = f"data on the host: {shown['host']} a step"
        what = f"{case.what}: host-fed / bare steps"
        yield Measurement(what, seconds["host"] / bare, "x", "<= 1.10 x", note)
        note = f"bare, in one scan: {shown['bare_scan']} a step"
        what = f"{case.what}: trainer / bare scan"
        yield Measurement(what, device / seconds["bare_scan"], "x", "", note)
    (first, first_compile), (second, second_compile) = time_starts(overrides)
    what = "start to first step, compilation apart"
    note = f"{first:.3g} s, of which JAX compiles {first_compile:.3g} s"
    yield Measurement(what, first - first_compile, "s", "< 10 s", note)
    what = "second start / first, compilation cache on"
    note = f"{second:.3g} s, of which tracing and reading the cache {second_compile:.3g} s"
    yield Measurement(what, second / first, "x", "", note)


# --- training steps ------------------------------------------------------------------------------


def compare(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Seconds per step of four variants of training that run in turn; medians over `ROUNDS` rounds.

    `bare_steps` makes one call per step and `bare_scan` one call for all steps; `device` and `host`
    are `lra train` with the data in these places. A warm-up round comes first.

    Args:
        overrides: config to train, as for `lra train`.
    Raises:
        ConfigError: the config asks for work that the bare step does not do.
        LraError: the variants do not train alike.
    """
    with tempfile.TemporaryDirectory(prefix="lra-bench-") as scratch:
        intervals = [f"trainer.{key}_every={steps}" for key in ("log", "eval", "checkpoint")]
        root = f"data.root={scratch}"
        words = [*TRAIN, *COMMON, root, *overrides, *intervals, f"trainer.steps={steps}"]
        cfg = compose(words)
        for key in ("optim.ema", "trainer.micro_batch"):
            if OmegaConf.select(cfg, key) is not None:
                raise ConfigError(f"{key}: the bare step of lra bench trainer has none; drop it")
        setup = Setup(cfg)
        store = prepare(setup.task, **data_arguments(cfg))
        train = first_batches(store, setup, cfg.trainer.batch_size, steps)
        run_steps, run_scan = bare_variants(setup, train, store.splits["test"])
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(1 + ROUNDS):
            outcomes = {}
            for name, run in (
                ("bare_steps", run_steps),
                ("device", lambda: run_trainer(words, "device", scratch)),
                ("bare_scan", run_scan),
                ("host", lambda: run_trainer(words, "host", scratch)),
            ):
                per_step, outcomes[name] = run()
                seconds[name].append(per_step)
            check_same_training(outcomes)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def run_trainer(words: Sequence[str], placement: str, scratch: str) -> tuple[float, Outcome]:
    """Runs `lra train` in this process; returns the seconds per step that its record states."""
    with tempfile.TemporaryDirectory(dir=scratch) as root, redirect_stdout(io.StringIO()):
        record = lra.train([*words, f"data.placement={placement}", f"output.root={root}"])
        (folder,) = (file.parent for file in Path(root).rglob("record.json"))
        (row,) = (row for row in read_metrics(folder) if "train/loss" in row)
        predictions = read_predictions(folder)
    assert predictions is not None
    return 1 / record["time"]["steps_per_s"], Outcome(row["train/loss"], predictions["logits"])


def bare_variants(setup: Setup, train: Examples, test: Split) -> tuple[Variant, Variant]:
    """The training step as one writes it without a trainer, jitted: in a loop and in a scan.

    Args:
        train: batches, NumPy arrays (steps, B, ...).
        test: split whose logits are compared.
    """
    num_steps = len(train.labels)
    batches = [jax.tree.map(lambda x, i=i: x[i], train) for i in range(num_steps)]
    batches, train = jax.block_until_ready(jax.device_put((batches, train)))
    inputs, lengths = jax.device_put((np.asarray(test.inputs), np.asarray(test.lengths)))
    step, scan = jitted_steps(setup)

    def loop(state: tuple, constants: Any, batches: Sequence[Examples]) -> tuple:
        for batch in batches:
            state = step(state, constants, batch)
        return state

    @jax.jit
    def predict(params: Any, stats: Any, constants: Any, inputs: Any, lengths: Any) -> jax.Array:
        model = nnx.merge(setup.graph, params, stats, constants)
        return model(setup.task.decode(inputs), lengths, train=False)

    def run(function: Callable[..., tuple], batches: Any) -> tuple[float, Outcome]:
        params, stats = jax.tree.map(jnp.copy, (setup.params, setup.batch_stats))
        state = (jnp.int32(0), params, stats, setup.tx.init(params), jnp.float32(0))
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(function(state, setup.constants, batches))
        seconds = time.perf_counter() - start
        _, params, stats, _, loss = state
        logits = np.asarray(predict(params, stats, setup.constants, inputs, lengths))
        return seconds / num_steps, Outcome(float(loss) / num_steps, logits)

    return partial(run, loop, batches), partial(run, scan, train)


def jitted_steps(setup: Setup) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    """Returns (state, constants, batch) -> state, and a scan of it over stacked batches.

    The state is (step, params, batch_stats, optimizer state, sum of losses).
    """

    def step(state: tuple, constants: Any, batch: Examples) -> tuple:
        count, params, stats, opt, total = state

        def loss(params: Any) -> tuple:
            model = nnx.merge(setup.graph, params, stats, constants, copy=True)
            rngs = nnx.Rngs(dropout=jax.random.fold_in(setup.dropout_key, count))
            logits = model(setup.task.decode(batch.inputs), batch.lengths, train=True, rngs=rngs)
            value = cross_entropy(logits, batch.labels, setup.label_smoothing).mean()
            return value, nnx.state(model, nnx.BatchStat)

        with matmul_precision(setup.precision):
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = setup.tx.update(grads, opt, params)
        return count + 1, optax.apply_updates(params, updates), stats, opt, total + value

    def scan(state: tuple, constants: Any, batches: Examples) -> tuple:
        def body(carry: tuple, batch: Examples) -> tuple[tuple, None]:
            return step(carry, constants, batch), None

        return jax.lax.scan(body, state, batches)[0]

    return jax.jit(step, donate_argnums=0), jax.jit(scan, donate_argnums=0)


def first_batches(store: Store, setup: Setup, batch_size: int, steps: int) -> Examples:
    """Returns NumPy arrays (steps, B, ...): the batches that a run draws in its first steps."""
    train = store.splits["train"]
    count = len(train.labels)
    per_epoch = count // batch_size
    orders = [
        np.asarray(epoch_order(setup.order_key, epoch, count))[: per_epoch * batch_size]
        for epoch in range(-(-steps // per_epoch))
    ]
    rows = np.concatenate(orders).reshape(-1, batch_size)[:steps]
    inputs, labels = np.asarray(train.inputs)[rows], np.asarray(train.labels, np.int32)[rows]
    return Examples(inputs, np.asarray(train.lengths)[rows], labels)


def check_same_training(outcomes: dict[str, Outcome]) -> None:
    """Raises LraError if losses or test logits differ beyond rounding.

    On a CPU the two runs of the trainer must agree bit for bit.
    """
    losses = {name: outcome.loss for name, outcome in outcomes.items()}
    if max(losses.values()) > min(losses.values()) * (1 + LOSS_TOLERANCE):
        raise LraError(f"the benchmark's variants differ in mean loss: {losses}")
    expected = outcomes["bare_steps"].logits
    for name, outcome in outcomes.items():
        error = np.linalg.norm(outcome.logits - expected) / np.linalg.norm(expected)
        if error > LOGITS_TOLERANCE:
            raise LraError(
                f"the test logits of {name} differ from those of bare_steps: {error:.2g}"
            )
    device, host = outcomes["device"].logits, outcomes["host"].logits
    if jax.default_backend() == "cpu" and not np.array_equal(device, host):
        raise LraError("the test logits differ between data.placement=device and host")


# --- start ---------------------------------------------------------------------------------------


def time_starts(overrides: Sequence[str]) -> list[tuple[float, float]]:
    """`time_start` twice on prepared data, the first time with an empty compilation cache."""
    with tempfile.TemporaryDirectory(prefix="lra-bench-") as scratch:
        words = [*START, *COMMON, *overrides, f"data.root={scratch}"]
        cfg = compose(words)
        prepare(build_task(cfg), **data_arguments(cfg))
        folders = [Path(scratch) / name for name in ("first", "second")]
        cache = Path(scratch) / "xla"
        return [time_start([*words, f"output.root={f}"], f, cache) for f in folders]


def time_start(words: Sequence[str], output: Path, cache: Path) -> tuple[float, float]:
    """Seconds of `lra train` in a new process from the start of the command to its first step.

    Returned with the part of it that JAX spends on tracing, lowering, compilation and its cache.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    command = [sys.executable, "-m", "lra.cli", "train", *words]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    total_s = time.perf_counter() - start
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise LraError(f"a start of lra train failed: {reason}")
    (file,) = output.rglob("record.json")
    times = json.loads(file.read_text())["time"]
    # outside of the training: imports, the config, the final table
    return total_s - times["wall_s"] + times["first_step_s"], times["compile_s"]
