"""`lra bench data`: speed of preparation, generators, opening a store and batches on the host."""

import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lra.bench.measurement import Measurement
from lra.config.build import build_task
from lra.config.compose import compose
from lra.data.store import prepare
from lra.errors import DataError
from lra.tasks.base import Task
from lra.tasks.pathfinder import generate

LISTOPS = ("task=listops",)
NUM_PICTURES = {32: 3000, 128: 200}  # by side length in pixels
WINDOWS = 5


def measure(data_root: Path) -> Iterator[Measurement]:
    """Measures preparation in a scratch folder, then opening, batches and the picture generator.

    Args:
        data_root: folder with the publishers' files. Text and Image are not measured without them.
    """
    with tempfile.TemporaryDirectory(prefix="lra-bench-") as scratch:
        listops = load_task(LISTOPS, scratch)
        what = "ListOps, 100,000 rows generated and packed"
        yield time_preparation(what, listops, scratch, "< 90 s")
        seconds = median_seconds(lambda: prepare(listops, scratch))
        yield Measurement("opening its store", seconds, "s", "< 0.2 s")
        train = prepare(listops, scratch).splits["train"]
        rng = np.random.default_rng(0)
        rate = 1 / median_seconds(lambda: train.batch(rng.integers(0, len(train), 64)))
        what = "random batches of 64 x 2,048 from it"
        yield Measurement(what, rate, "batches/s", ">= 2,000 batches/s")
        for name, what, goal in (
            ("text", "Text (IMDB), both splits packed", "< 30 s"),
            ("image", "Image (CIFAR-10) packed", "< 20 s"),
        ):
            task = load_task([f"task={name}"], data_root)
            yield time_preparation(what, task, scratch, goal)
    yield time_pictures(32, ">= 300 pictures/s")
    yield time_pictures(128, ">= 20 pictures/s")


def load_task(overrides: Sequence[str], data_root: str | Path) -> Task:
    return build_task(compose([*overrides, f"data.root={data_root}"]))


def time_preparation(what: str, task: Task, folder: str, goal: str) -> Measurement:
    start = time.perf_counter()
    try:
        store = prepare(task, folder)
    except DataError as error:
        return Measurement(what, None, "s", goal, str(error).split(",")[0])
    seconds = time.perf_counter() - start
    splits = store.manifest["splits"].values()
    rows = sum(split["count"] for split in splits if "same_as" not in split)
    return Measurement(what, seconds, "s", goal, f"{rows:,} rows, {store.manifest['source']}")


def time_pictures(size: int, goal: str) -> Measurement:
    count = NUM_PICTURES[size]
    generate(1, size=size)  # warm-up
    start = time.perf_counter()
    generate(count, size=size, seed=1)
    rate = count / (time.perf_counter() - start)
    what = f"Pathfinder pictures of {size} x {size}, hard"
    return Measurement(what, rate, "pictures/s", goal, f"{count:,} pictures")


def median_seconds(call: Callable[[], object]) -> float:
    """Seconds per call: the median over `WINDOWS` windows of the mean over a window."""
    timer = timeit.Timer(call)
    count, _ = timer.autorange()
    return float(np.median(timer.repeat(WINDOWS, count))) / count
