"""Does the trainer stand in the way? `lra bench trainer`: training steps through `lra.training.trainer`, of data on the device and of data
on the host, beside the same steps of a plain jitted function; and how long a start takes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from lra.config.build import data_arguments
from lra.config.compose import compose
from lra.data.store import Store, prepare
from lra.errors import ConfigError, LraError
from lra.runs.run_folder import RunFolder
from lra.training.data_parallel import choose_devices
from lra.training.preemption import Signals
from lra.training.prefetch import HostPrefetch
from lra.training.setup import Setup
from lra.training.state import Best, Examples, State
from lra.training.step import cross_entropy, epoch_order, matmul_precision
from lra.training.trainer import Run, place

ROUNDS = 5
# a round logs twice and ends where a run would evaluate; both are left out, and so is a second device
COMMON = (
    "trainer.devices=1",
    "trainer.progress=false",
    "tracker.wandb=off",
    "task.sizes={train: 512, val: 64, test: 64}",
)
START = ("debug=tiny", "trainer.steps=4", "task.sizes={train: 512, val: 64, test: 64}")
TOLERANCE = 0.01  # of the mean loss: the sides sum in another order


class Result(NamedTuple):
    """Seconds a step, medians over rounds in which every side ran."""

    steps: float  # bare, a call each
    scan: float  # bare, all in one call
    resident: float  # through the trainer
    host: float  # through the trainer, data on the host


class Side(Run):
    """A run of which the training steps are timed alone: it is neither scored nor saved."""

    def evaluate(self, step: int, state: State, best: Best, val: Examples) -> tuple[State, Best]:
        return state, best

    def save(self, step: int, state: State, best: Best) -> None: ...

    def begin(self, store: Store) -> None:
        self.feed, self.program = self.fit(place(store, self.layout, self.cfg.data.placement))
        self.state = self.new_state()
        self.feed.start(0)

    def go_on(self, until: int) -> None:
        """The trainer's own loop up to the step `until`."""
        self.cfg.trainer.steps = until
        self.state, _ = self.loop(
            self.state, Best(None, None), {"val": Examples(None, None, None)}, Signals()
        )
        jax.block_until_ready(self.state)


def compare(overrides: Sequence[str], steps: int, rounds: int | None = None) -> Result:
    """Time of the same steps by every side, in rounds of `steps` after one that compiles.

    Args:
        overrides: as for `lra train`.
    Raises:
        LraError: the sides did not train on the same batches, or not to the same loss.
    """
    rounds = rounds or ROUNDS
    total = steps * (rounds + 1)
    logged = [
        f"trainer.{key}_every={n}"
        for key, n in (("log", steps // 2 or 1), ("eval", steps), ("checkpoint", steps))
    ]
    with tempfile.TemporaryDirectory(prefix="lra-bench-") as scratch:
        words = [*COMMON, f"data.root={scratch}", *overrides, *logged, f"trainer.steps={total}"]
        sides = {
            name: _side([*words, f"data.placement={name}"], Path(scratch) / name)
            for name in ("device", "host")
        }
        cfg, setup = sides["device"].cfg, sides["device"].setup
        for key in ("optim.ema", "trainer.micro_batch"):
            if OmegaConf.select(cfg, key) is not None:
                raise ConfigError(
                    f"{key}: the bare step has none, so that its work would count against the trainer"
                )
        store = prepare(setup.task, **data_arguments(cfg))
        for side in sides.values():
            side.begin(store)
        try:
            return _rounds(sides, store, cfg, setup, steps, rounds)
        finally:
            for side in sides.values():
                side.feed.close()
                side.folder.close()


def _side(words: list[str], folder: Path) -> Side:
    cfg = compose(words)
    side = Side(cfg, RunFolder(folder), Setup(cfg), choose_devices(cfg))
    side.reporter.console.quiet = True
    return side


def _rounds(
    sides: dict[str, Side], store: Store, cfg: DictConfig, setup: Setup, steps: int, rounds: int
) -> Result:
    plain_step, plain_scan = bare(setup)
    states = {"steps": first_bare(setup), "scan": first_bare(setup)}
    seconds: dict[str, list[float]] = {name: [] for name in (*states, *sides)}
    reader = sides["host"].feed
    assert isinstance(reader, HostPrefetch)

    def timed(name: str, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - start)

    def one_by_one(batches: list[Examples]) -> None:
        for batch in batches:
            states["steps"] = plain_step(states["steps"], setup.constants, batch)
        jax.block_until_ready(states["steps"])

    def at_once(stacked: Examples) -> None:
        states["scan"] = jax.block_until_ready(plain_scan(states["scan"], setup.constants, stacked))

    for round_ in range(rounds + 1):
        first = round_ * steps
        stacked = batches_of(store, setup, cfg.trainer.batch_size, range(first, first + steps))
        batches = [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), stacked) for i in range(steps)]
        stacked = jax.block_until_ready(jax.tree.map(jnp.asarray, stacked))
        jax.block_until_ready(batches)
        if round_ == 0:
            check_batches(reader, stacked, steps)
        timed("steps", partial(one_by_one, batches))
        timed("device", partial(sides["device"].go_on, first + steps))
        timed("scan", partial(at_once, stacked))
        timed("host", partial(sides["host"].go_on, first + steps))
        if round_ == 0:
            check_same_work(states, sides, steps)
    median = {name: float(np.median(times[1:])) / steps for name, times in seconds.items()}
    return Result(median["steps"], median["scan"], median["device"], median["host"])


def batches_of(store: Store, setup: Setup, batch_size: int, steps: range) -> Examples:
    """NumPy arrays (steps, B, ...) of the examples that a run draws in these steps."""
    train = store.splits["train"]
    per_epoch = len(train.labels) // batch_size
    orders = {
        e: np.asarray(epoch_order(setup.order_key, e, len(train.labels)))
        for e in {s // per_epoch for s in steps}
    }
    rows = np.stack(
        [orders[s // per_epoch][s % per_epoch * batch_size :][:batch_size] for s in steps]
    )
    return Examples(
        np.asarray(train.inputs)[rows],
        np.asarray(train.lengths)[rows],
        np.asarray(train.labels, np.int32)[rows],
    )


def check_batches(feed: HostPrefetch, stacked: Examples, steps: int) -> None:
    """Raises: LraError, if the windows from the host hold other examples than the bare steps are given."""
    for first in range(0, steps, feed.window_steps):
        count = min(feed.window_steps, steps - first)
        window = jax.tree.map(np.asarray, feed.window(first).batches)
        for ours, theirs in zip(window, stacked, strict=True):
            expected = np.asarray(theirs)[first : first + count]
            if not np.array_equal(ours[:count].reshape(expected.shape), expected):
                raise LraError(
                    f"the batches of steps {first} to {first + count} differ between host and device"
                )


def check_same_work(states: dict[str, tuple], sides: dict[str, Side], steps: int) -> None:
    """Raises: LraError, if the sides come to other losses or, on a CPU, the two of the trainer to other parameters."""
    losses = {name: float(state[-1]) / steps for name, state in states.items()}
    for name, side in sides.items():
        logged = [row["train/loss"] for row in side.folder.read_metrics()]
        losses[name] = float(np.mean(logged))
    if max(losses.values()) > min(losses.values()) * (1 + TOLERANCE):
        raise LraError(f"the sides did not train alike: mean losses {losses}")
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), sides["device"].state.params, sides["host"].state.params
    )
    if jax.default_backend() == "cpu" and not all(jax.tree.leaves(same)):
        raise LraError("parameters differ between data on the device and on the host")


def first_bare(setup: Setup) -> tuple:
    """(step, params, stats, optimizer state, sum of losses) before the first step."""
    params, stats = jax.tree.map(jnp.copy, (setup.params, setup.batch_stats))
    return jnp.int32(0), params, stats, setup.tx.init(params), jnp.float32(0)


def bare(setup: Setup) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    """A training step as one writes it down, jitted: (state, fixed, batch) -> state; and a scan of it over many batches."""

    def step(state: tuple, fixed: Any, batch: Examples) -> tuple:
        count, params, stats, opt, total = state

        def loss(params: Any) -> tuple:
            model = nnx.merge(setup.graph, params, stats, fixed, copy=True)
            rngs = nnx.Rngs(dropout=jax.random.fold_in(setup.dropout_key, count))
            logits = model(setup.task.decode(batch.inputs), batch.lengths, train=True, rngs=rngs)
            value = cross_entropy(logits, batch.labels, setup.label_smoothing).mean()
            return value, nnx.state(model, nnx.BatchStat)

        with matmul_precision(setup.precision):
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = setup.tx.update(grads, opt, params)
        return count + 1, optax.apply_updates(params, updates), stats, opt, total + value

    def scan(state: tuple, fixed: Any, batches: Examples) -> tuple:
        return jax.lax.scan(lambda carry, batch: (step(carry, fixed, batch), None), state, batches)[
            0
        ]

    return jax.jit(step, donate_argnums=0), jax.jit(scan, donate_argnums=0)


# --- start -----------------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Seconds from the start of `lra train` to the end of its first step, and those of them in which JAX compiled."""

    total: float
    compiling: float  # tracing, lowering, compilation, and reading what was compiled before


def starts(overrides: Sequence[str]) -> tuple[Start, Start]:
    """The first start, with an empty compilation cache, and the second; the data are prepared before both."""
    with tempfile.TemporaryDirectory(prefix="lra-bench-") as scratch:
        words = [
            *START,
            *overrides,
            f"data.root={scratch}",
            f"output.root={scratch}/runs",
            "tracker.wandb=off",
        ]
        cfg = compose(words)
        prepare(Setup(cfg).task, **data_arguments(cfg))
        return _start(words, Path(scratch)), _start(words, Path(scratch))


def _start(words: list[str], scratch: Path) -> Start:
    out = scratch / "start.json"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "xla")}
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    command = [sys.executable, "-m", "lra.bench.trainer", repr(time.time()), str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not out.exists():
        raise LraError(
            f"a start of lra train failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"
        )
    result = Start(*json.loads(out.read_text()))
    out.unlink()
    return result


def start_here(began: float, out: Path, words: Sequence[str]) -> None:
    """`lra train` until its first step is done, in this process, which began at `time.time() == began`."""
    from lra.cli import main
    from lra.runs.progress import Reporter

    compiling: list[tuple[float, float]] = []

    def note(event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.time()
            compiling.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(note)

    def first_step(*_: object) -> None:
        out.write_text(json.dumps([time.time() - began, covered(compiling)]))
        os._exit(0)

    Reporter.advance = first_step  # type: ignore[assignment, method-assign]
    sys.exit(main(["train", *words]))


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (begin, end): the tracing of a function contains that of those it calls."""
    total, reached = 0.0, -np.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    start_here(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
