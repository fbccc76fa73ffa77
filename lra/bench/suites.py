"""How fast is it here? Measurements that people can repeat: `lra bench data`, `lra bench ops`, `lra bench trainer`.

A measurement is one number with its unit and the goal it is held against. The result carries what it was measured on;
it is printed as a table and, with `--output`, kept as JSON.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lra.errors import ConfigError, DataError
from lra.files import write_atomically
from lra.runs.machine import cores, cpu_name

SUITES = ("data", "ops", "trainer")
ROUNDS = 5  # of a comparison, in each of which both sides run
WINDOW_SECONDS = 0.5  # of one measured window of a rate
WINDOWS = 5
GIVEN_STEPS = 50  # a round of `lra bench trainer KEY=VALUE ...`


class Measurement(NamedTuple):
    what: str
    value: float | None  # None: not measured, `note` says why
    unit: str
    goal: str
    note: str = ""


def run(suite: str, data_root: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a suite; returns what `measurements_table` prints and `save` writes.

    Args:
        overrides: of `trainer`, what is trained, as for `lra train`; none for the models' own cases.
    Raises:
        ConfigError: overrides for another suite.
    """
    from lra.runs.machine import git_commit, versions

    if overrides and suite != "trainer":
        raise ConfigError(
            f"lra bench {suite} takes no {overrides[0]}; trainer and efficiency take KEY=VALUE words"
        )
    machine: dict[str, Any] = {"cpu": cpu_name(), "cores": cores(), "system": platform.system()}
    if suite == "data":
        measurements = list(data(data_root))
    else:
        import jax

        machine["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        measurements = list(ops() if suite == "ops" else trainer(overrides))
    return {
        "suite": suite,
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine,
        "measurements": [m._asdict() for m in measurements],
    }


def measurements_table(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its origin below."""
    from tabulate import tabulate

    rows = [
        [
            m["what"],
            "not measured" if m["value"] is None else f"{m['value']:,.4g} {m['unit']}",
            m["goal"],
            m["note"],
        ]
        for m in result["measurements"]
    ]
    machine, versions = result["machine"], result["versions"]
    device = f"{machine['device']}, " if "device" in machine else ""
    return (
        tabulate(rows, headers=["what", "measured", "goal", "note"], tablefmt="pipe")
        + f"\n\n{device}{machine['cpu']}, {machine['cores']} cores, commit {result['commit']}, "
        + f"Python {versions['python']}, NumPy {versions['numpy']}, JAX {versions['jax']}\n"
    )


def save(result: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())


# --- data ----------------------------------------------------------------------------------------------------------


def data(data_root: Path) -> Iterator[Measurement]:
    """From sources to batches: preparation in a scratch folder, generators, opening, random batches on the host.

    Args:
        data_root: where the publishers' files are looked for; without them their lines say so.
    """
    with tempfile.TemporaryDirectory(prefix="lra-bench-") as scratch:
        listops = ["task=listops"]
        yield _prepare(
            "ListOps, 100,000 rows generated and packed", listops, data_root, scratch, "< 90 s"
        )
        yield _open("opening its store", listops, scratch, "< 0.2 s")
        yield _batches(
            "random batches of 64 x 2,048 from it", listops, scratch, ">= 2,000 batches/s"
        )
        yield _prepare(
            "Text (IMDB), both splits packed", ["task=text"], data_root, scratch, "< 30 s"
        )
        yield _prepare("Image (CIFAR-10) packed", ["task=image"], data_root, scratch, "< 20 s")
    yield _pictures(32, 3000, ">= 300 pictures/s")
    yield _pictures(128, 200, ">= 20 pictures/s")


def _task(overrides: Sequence[str], data_root: str | Path) -> Any:
    from lra.config.build import build_task
    from lra.config.compose import compose

    return build_task(compose([*overrides, f"data.root={data_root}"]))


def _prepare(
    what: str, overrides: Sequence[str], data_root: Path, scratch: str, goal: str
) -> Measurement:
    from lra.data.store import prepare

    task = _task(overrides, data_root)
    start = time.perf_counter()
    try:
        store = prepare(task, scratch)
    except DataError as error:
        return Measurement(what, None, "s", goal, str(error).split(",")[0])
    seconds = time.perf_counter() - start
    rows = sum(
        entry["count"] for entry in store.manifest["splits"].values() if "same_as" not in entry
    )
    return Measurement(what, seconds, "s", goal, f"{rows:,} rows, {store.manifest['source']}")


def _open(what: str, overrides: Sequence[str], scratch: str, goal: str) -> Measurement:
    from lra.data.store import prepare

    task = _task(overrides, scratch)
    return Measurement(what, _median_seconds(lambda: prepare(task, scratch)), "s", goal)


def _batches(what: str, overrides: Sequence[str], scratch: str, goal: str) -> Measurement:
    from lra.data.store import prepare

    train = prepare(_task(overrides, scratch), scratch).splits["train"]
    rng = np.random.default_rng(0)
    rate = 1 / _median_seconds(lambda: train.batch(rng.integers(0, len(train), 64)))
    return Measurement(what, rate, "batches/s", goal)


def _pictures(size: int, count: int, goal: str) -> Measurement:
    from lra.tasks.pathfinder import generate

    generate(64, size=size)  # the workers start
    start = time.perf_counter()
    generate(count, size=size, seed=1)
    rate = count / (time.perf_counter() - start)
    return Measurement(
        f"Pathfinder pictures of {size} x {size}, hard",
        rate,
        "pictures/s",
        goal,
        f"{count:,} pictures",
    )


def _median_seconds(call: Callable[[], Any]) -> float:
    """Of one call, over windows of many."""
    call()
    means = []
    for _ in range(WINDOWS):
        calls, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < WINDOW_SECONDS:
            call()
            calls += 1
        means.append(elapsed / calls)
    return float(np.median(means))


# --- ops -----------------------------------------------------------------------------------------------------------


def ops() -> Iterator[Measurement]:
    """The models' operations forward and backward, each beside the published order of the same work, in one run."""
    import jax

    from models.benchmarks import Case, cases

    for case in cases(jax.default_backend()):
        if isinstance(case, Case):
            yield from _compare(case)
        else:
            start = time.perf_counter()
            case.call()
            yield Measurement(case.what, time.perf_counter() - start, "s", case.goal)


def _compare(case: Any) -> Iterator[Measurement]:
    """How many times faster ours is, and how much of the memory it takes; without a published form, seconds and GB."""
    import jax

    def compiled(function: Callable[..., Any]) -> Any:
        def forward_backward(learned: Any, fixed: Any) -> Any:
            y, pull = jax.vjp(lambda *x: function(*x, *fixed), *learned)
            return y, pull(y)

        return jax.jit(forward_backward).lower(case.learned, case.fixed).compile()

    functions = [compiled(f) for f in (case.ours, case.published) if f is not None]
    seconds: list[list[float]] = [[] for _ in functions]
    for round_ in range(ROUNDS + 1):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(case.learned, case.fixed))
            if round_:  # the first one warms up
                times.append(time.perf_counter() - start)
    time_of = [float(np.median(times)) for times in seconds]
    memory = [function.memory_analysis().temp_size_in_bytes for function in functions]
    if case.published is None:
        whole = functions[0].memory_analysis()
        total = memory[0] + whole.argument_size_in_bytes + whole.output_size_in_bytes
        yield Measurement(f"{case.what}: time", time_of[0], "s", case.faster)
        yield Measurement(
            f"{case.what}: memory",
            total / 1e9,
            "GB",
            case.smaller,
            "arguments, results, temporaries",
        )
        return
    notes = [
        "ours {}, published order {}".format(*map(shown, both))
        for shown, both in ((_time, time_of), (_size, memory))
    ]
    yield Measurement(f"{case.what}: faster", time_of[1] / time_of[0], "x", case.faster, notes[0])
    yield Measurement(f"{case.what}: memory", memory[0] / memory[1], "x", case.smaller, notes[1])


# --- trainer -------------------------------------------------------------------------------------------------------


def trainer(overrides: Sequence[str] = ()) -> Iterator[Measurement]:
    """Steps through the trainer beside bare ones, and how long a start takes (`lra.bench.suites.trainer`)."""
    import jax

    from lra.bench.suites.trainer import compare, starts
    from models.benchmarks import TrainerCase, trainer_cases

    given = TrainerCase("as given", tuple(overrides), GIVEN_STEPS)
    for case in [given] if overrides else trainer_cases(jax.default_backend()):
        took = compare(case.overrides, case.steps)
        note = (
            f"{case.steps} steps a round: {_time(took.resident)} a step, bare {_time(took.steps)}"
        )
        yield Measurement(
            f"{case.what}: trainer / bare steps", took.resident / took.steps, "x", "<= 1.05 x", note
        )
        note = f"data on the host: {_time(took.host)} a step"
        yield Measurement(
            f"{case.what}: host-fed / bare steps", took.host / took.steps, "x", "<= 1.10 x", note
        )
        note = f"bare, in one scan: {_time(took.scan)} a step"
        yield Measurement(
            f"{case.what}: trainer / bare scan", took.resident / took.scan, "x", "", note
        )
    first, second = starts(overrides)
    note = f"{first.total:.3g} s, of which JAX compiles {first.compiling:.3g} s"
    yield Measurement(
        "start to first step, compilation apart", first.total - first.compiling, "s", "< 10 s", note
    )
    note = f"{second.total:.3g} s, of which tracing and reading the cache {second.compiling:.3g} s"
    yield Measurement(
        "second start / first, compilation cache on", second.total / first.total, "x", "", note
    )


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
