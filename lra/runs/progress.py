"""Console output of a run: header, progress bar, one line per evaluation, result."""

import datetime
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lra.config.options import options
from lra.runs.console import discard_stdout

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0  # between two messages about long work without a terminal


class Screen(Console):
    """A console that stays silent after its reader closed the pipe (`lra train ... | head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_stdout()


class Reporter:
    """Console output of one run. `bar` is a context manager and needs a terminal."""

    def __init__(self, steps: int, batch_size: int, *, live: bool, quiet: bool = False):
        self.steps, self.batch_size = steps, batch_size
        self.training = ""  # training columns of the next line
        self.trained = False  # whether a call after the first, which compiles, was timed
        self.printed = time.monotonic()  # when the last line was printed
        # no wrapping in a pipe or a log file
        self.console = Screen(highlight=False, soft_wrap=not Console().is_terminal, quiet=quiet)
        self.print = self.console.print
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
            TextColumn("{task.fields[rate]:.3g} steps/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (live and self.console.is_terminal),
        )
        nan = float("nan")
        self.row = self.bar.add_task("", total=steps, loss=nan, accuracy=nan, rate=nan)

    def header(self, record: dict, rates: list[tuple], folder: Path) -> None:
        """Prints data, model, folder and `rates`, one row for each parameter group."""
        data, device, config = record["data"], record["device"], record["config"]
        counts = ", ".join(f"{name} {part['count']:,}" for name, part in data["splits"].items())
        self.print(
            f"[bold]{record['model']}[/] on [bold]{record['task']}[/] "
            f"({data['source']}, {counts}), protocol {record['protocol']}, seed {record['seed']}, "
            f"{device['count']} x {device['kind']}"
        )
        params = record["params"]["total"]
        if param_count := config["model"].get("param_count"):
            self.print(
                f"model.param_count={param_count}: backbone.width={config['backbone']['width']}, "
                f"{params:,} parameters"
            )
        heads = ("group", "learning rate", "weight decay", "tensors", "parameters")
        table = Table(*heads, box=None, pad_edge=False)
        for name, lr, decay, tensors, count in rates:
            table.add_row(name, f"{lr:g}", f"{decay:g}", str(tensors), f"{count:,}")
        self.print(table)
        self.print(f"to beat: {_reference(record)}")
        if device["platform"] == "cpu" and params > 2_000_000:
            self.print(
                f"{params / 1e6:.0f} M parameters on a CPU may take minutes per step; "
                "debug=tiny checks whether the model runs"
            )
        if hint := settings_hint(record):
            self.print(hint)
        resumed = f", resumed from step {record['step']}" if record["resumed_from"] else ""
        self.print(f"folder: {folder}{resumed}")

    def micro_batch(
        self, size: int, batch_size: int, needs: dict[int, int | None], eval_batch: int
    ) -> None:
        """Prints the choice of `trainer.micro_batch=auto` and the bytes each tried size needs."""
        sizes = {n: "?" if need is None else f"{need / 1e9:.2f} GB" for n, need in needs.items()}
        tried = ", ".join(f"{n} needs {need}" for n, need in sizes.items())
        self.print(
            f"micro-batch {size} of {batch_size} examples ({tried}); "
            f"evaluations take {eval_batch} at a time"
        )

    def advance(self, step: int, done: int, seconds: float, metric_sums) -> None:
        """Updates the bar after `done` steps; `metric_sums` holds loss, correct and count.

        Without a bar, prints a line if the next call would end more than `LOG_EVERY_S` seconds
        after the last line.
        """
        loss, correct, count = (float(x) for x in metric_sums)
        rate = done / seconds
        self.bar.update(
            self.row, completed=step, loss=loss / count, accuracy=correct / count, rate=rate
        )
        left = datetime.timedelta(seconds=round((self.steps - step) / rate))
        speed = f"{rate:.3g} steps/s  {rate * self.batch_size:,.0f} examples/s  {left} left"
        self.training = f"loss {loss / count:.3f} accuracy {correct / count:.3f}  " + (
            speed if self.trained else f"first call {seconds:.1f} s"
        )
        self.trained = True
        if not self.bar.live.is_started and time.monotonic() + seconds - self.printed > LOG_EVERY_S:
            self._line(step)

    def _line(self, step: int, more: str = "") -> None:
        self.printed = time.monotonic()
        self.print(f"step {step:>6}/{self.steps}  {self.training}{more}")

    def predicting(self, name: str, done: int, count: int) -> None:
        """Prints how many examples of a split are scored, after `LOG_EVERY_S` without a line."""
        now = time.monotonic()
        if not self.bar.live.is_started and now - self.printed > LOG_EVERY_S:
            self.printed = now
            self.print(f"scoring {name}: {done:,} of {count:,} examples")

    def evaluation(self, step: int, result: dict, improved: bool) -> None:
        """Prints one evaluation; a star marks the best weights so far."""
        self._line(
            step,
            f"  validation loss {result['loss']:.3f} accuracy {result['accuracy']:.3f}"
            f"{' *' if improved else ''}",
        )

    def scoring(self, count: int, stopped_early: dict | None) -> None:
        if stopped_early:
            step, reason = stopped_early["step"], stopped_early["reason"]
            self.print(f"ended at step {step:,} of {self.steps:,} by {reason}")
        self.print(f"scoring the test split, {count:,} examples")

    def finished(self, record: dict, sync_hint: str | None) -> None:
        """Prints the result, reference accuracies and the upload command of an offline W&B run."""
        test, selection = record["metrics"]["test"], record["selection"]
        self.print(
            f"test accuracy [bold]{100 * test['accuracy']:.2f} %[/] on {test['count']:,} examples, "
            f"weights of step {selection['step']:,} ({selection['rule']}); "
            f"reference lines: {_reference(record)}"
        )
        if not record["learned"]:
            self.print("test accuracy is within noise of chance: FAIL in a table")
        if sync_hint:
            self.print(f"W&B offline; to upload: {sync_hint}")


def settings_hint(record: dict) -> str | None:
    """Names the experiment with published settings for a run without one; None for other tasks."""
    task, experiments = record["task"], options("experiment")
    if record["experiment"] or not any(name.startswith(f"{task}/") for name in experiments):
        return None
    name = f"{task}/{record['model']}"
    paper = "no published experiment for this model"
    if name in experiments:
        paper = f"experiment={name} has those of the paper"
    return f"settings: defaults and overrides; {paper}"


def _reference(record: dict) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {100 * x:.1f} %" for name, x in record["reference"].items()
    )


def preparing(task, work: Callable[..., Any]) -> Any:
    """Returns `work(on_progress=tick)`, with a progress bar for the preparation of `task`'s data.

    `tick(what, done, total)` moves the bar. Without a terminal, a long preparation logs a message
    every `LOG_EVERY_S` seconds.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(f"preparing {task.name}", total=None)
        logged = time.monotonic()

        def tick(what: str, done: int, total: int | None) -> None:
            nonlocal logged
            what = f"preparing {task.name} {what}"
            bar.update(row, description=what, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                count = f" {done:,}" + (f" of {total:,}" if total else "") if done else ""
                log.info("%s%s", what, count)

        return work(on_progress=tick)
