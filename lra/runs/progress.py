"""What a run shows on the terminal: a header, a live bar, one line an evaluation, and the result."""

import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

LARGE = 2_000_000  # parameters
QUIET_SECONDS = 10.0  # between two lines about a long preparation, where there is no terminal


class Screen(Console):
    """A console whose reader may leave: `lra train ... | head`, or a pager that is closed, ends no run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also for what others print, and for the last flush
        os.close(nowhere)


class Reporter:
    """Progress of one run. Where the output is no terminal, only the lines are printed, not the bar."""

    def __init__(self, steps: int, batch_size: int, *, live: bool):
        self.steps, self.batch_size = steps, batch_size
        self.training = ""  # the last word on training, for outputs without a bar
        # a pipe or a log wraps nothing
        self.console = Screen(highlight=False, soft_wrap=not Console().is_terminal)
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
            TextColumn("{task.fields[rate]:.0f} examples/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (live and self.console.is_terminal),
        )
        self.row = self.bar.add_task(
            "", total=steps, loss=float("nan"), accuracy=float("nan"), rate=float("nan")
        )

    def header(self, record: dict, rates: list[tuple], folder: Path) -> None:
        """What is about to run: data, model, parameter groups, where the results go."""
        counts = ", ".join(
            f"{name} {part['count']:,}" for name, part in record["data"]["splits"].items()
        )
        device = record["device"]
        self.console.print(
            f"[bold]{record['model']}[/] on [bold]{record['task']}[/] ({record['data']['source']}, {counts}), "
            f"protocol {record['protocol']}, seed {record['seed']}, {device['count']} x {device['kind']}"
        )
        config, params = record["config"], record["params"]["total"]
        if budget := config["model"].get("param_count"):
            self.console.print(
                f"model.param_count={budget}: backbone.width={config['backbone']['width']}, {params:,} parameters"
            )
        table = Table(
            "group",
            "learning rate",
            "weight decay",
            "tensors",
            "parameters",
            box=None,
            pad_edge=False,
        )
        for name, lr, decay, tensors, count in rates:
            table.add_row(name, f"{lr:g}", f"{decay:g}", str(tensors), f"{count:,}")
        self.console.print(table)
        self.console.print(
            "to beat: "
            + ", ".join(
                f"{name.replace('_', ' ')} {100 * x:.1f} %"
                for name, x in record["reference"].items()
            )
        )
        if device["platform"] == "cpu" and params > LARGE:
            self.console.print(
                f"{params / 1e6:.0f} M parameters on a CPU may take minutes a step and days in all; "
                "debug=tiny tries whether it runs"
            )
        resumed = f", resumed from step {record['step']}" if record["resumed_from"] else ""
        self.console.print(f"folder: {folder}{resumed}")

    def micro_batch(
        self, size: int, batch_size: int, needs: dict[int, int | None], eval_batch: int
    ) -> None:
        """What `trainer.micro_batch=auto` found, and the bytes that each size it tried needs."""
        tried = ", ".join(
            f"{n} needs {'?' if need is None else f'{need / 1e9:.2f} GB'}"
            for n, need in needs.items()
        )
        self.console.print(
            f"micro-batch {size} of {batch_size} examples ({tried}); evaluations take {eval_batch} at a time"
        )

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def advance(self, step: int, done: int, seconds: float, tally) -> None:
        """`done` more steps took `seconds`; `tally` holds the sums of loss, correct and count since the last line."""
        loss, correct, count = (float(x) for x in tally)
        rate = done * self.batch_size / seconds
        self.bar.update(
            self.row, completed=step, loss=loss / count, accuracy=correct / count, rate=rate
        )
        left = datetime.timedelta(seconds=round((self.steps - step) * self.batch_size / rate))
        self.training = f"loss {loss / count:.3f} accuracy {correct / count:.3f}  {rate:,.0f} examples/s  {left} left"

    def evaluation(self, step: int, result: dict, improved: bool) -> None:
        """A line an evaluation; a star where the weights are the best so far."""
        validation = f"validation loss {result['loss']:.3f} accuracy {result['accuracy']:.3f}{' *' if improved else ''}"
        self.console.print(f"step {step:>6}/{self.steps}  {self.training}  {validation}")

    def scoring(self, count: int, stopped_early: dict | None) -> None:
        if stopped_early:
            self.console.print(
                f"ended at step {stopped_early['step']:,} of {self.steps:,} by {stopped_early['reason']}"
            )
        self.console.print(f"scoring the test split, {count:,} examples")

    def finished(self, record: dict, sync_hint: str | None) -> None:
        """The result, beside the lines it has to beat, and how to upload what W&B kept offline."""
        test, selection = record["metrics"]["test"], record["selection"]
        lines = ", ".join(
            f"{name.replace('_', ' ')} {100 * x:.1f} %" for name, x in record["reference"].items()
        )
        self.console.print(
            f"test accuracy [bold]{100 * test['accuracy']:.2f} %[/] on {test['count']:,} examples, weights of step "
            f"{selection['step']:,} ({selection['rule']}); reference lines: {lines}"
        )
        if not record["learned"]:
            self.console.print("that is within noise of chance: not learned, FAIL in a table")
        if sync_hint:
            self.console.print(f"W&B offline; to upload: {sync_hint}")


def preparing(task, work: Callable[..., Any]) -> Any:
    """Run `work(on_progress=tick)` while showing that `task`'s data is prepared; `tick(what, done, total)` moves the bar.

    Where the output is no terminal, what takes long says so in a line now and then on stderr.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(f"preparing {task.name}", total=None)
        said = time.monotonic()

        def tick(what: str, done: int, total: int | None) -> None:
            nonlocal said
            bar.update(
                row, description=f"preparing {task.name} {what}", completed=done, total=total
            )
            if not console.is_terminal and time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                of = f" {done:,}" + (f" of {total:,}" if total else "") if done else ""
                print(f"preparing {task.name} {what}{of}", file=sys.stderr, flush=True)

        return work(on_progress=tick)
