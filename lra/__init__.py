"""Long Range Arena in JAX: every task, every baseline, one trainer, honest tables.

splits = lra.load("listops", "strict")  # splits["train"].inputs (n, L), .lengths (n,), .labels (n,)
record = lra.train(["task=listops_short", "model=lru", "seed=1"])
model, task = lra.load_run(FOLDER)
logits = model(*task.encode("[MAX 2 9 [MIN 4 7 ] 0 ]"))
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from lra.data.store import Split
    from lra.tasks.base import Task

Paths = str | Path | Iterable[str | Path]


def compose(overrides: Sequence[str] = ()) -> "DictConfig":
    """The resolved config of `lra train OVERRIDES`."""
    from lra.config.compose import compose

    return compose(overrides)


def load(
    task: str, protocol: str = "strict", overrides: Sequence[str] = ()
) -> "Mapping[str, Split]":
    """The splits of a task as memory-mapped arrays; prepares the data if missing.

    Args:
        task: a name that `lra tasks` lists.
        protocol: strict, s4 or lra2020.
        overrides: as on the command line, such as `data.root=DIR` or `task.source=release`.
    Raises:
        LraError: unknown name, or missing or malformed data.
    """
    from lra.config.build import build_task, data_arguments
    from lra.config.compose import compose
    from lra.data.store import prepare

    cfg = compose([f"task={task}", f"protocol={protocol}", *overrides])
    return prepare(build_task(cfg), **data_arguments(cfg)).splits


def train(cfg: "DictConfig | Sequence[str]") -> dict[str, Any]:
    """Trains a config, from `compose` or overrides; returns its record or raises LraError."""
    from omegaconf import DictConfig

    from lra.config.compose import compose
    from lra.training.run import train

    return train(cfg if isinstance(cfg, DictConfig) else compose(cfg))


def load_run(folder: str | Path, **options: Any) -> "tuple[Any, Task]":
    """The trained model of a run folder, an `nnx.Module`, and its task.

    `model(inputs, lengths)` gives the logits and `model.layers(inputs, lengths)` the hidden
    features of each layer. Both take what `task.encode(...)` returns for examples of one's own;
    `task.decode(jnp.asarray(split.inputs[:8]))` makes the inputs of a split.

    Args:
        options: `weights` best or last (those that the protocol selects), and `overrides` and
            `allow_targets` as KEY=VALUE and --allow-target of `lra eval`.
    Raises:
        LraError: no run, no checkpoint, or a config that cannot be built.
    """
    from lra.report.saved_run import load_run

    return load_run(folder, **options)


def records(paths: Paths = ("runs",)) -> "pd.DataFrame":
    """The records at or below `paths`, a row each.

    Keys of nested sections are joined with dots: `metrics.test.accuracy`, `config.optim.lr`. The
    column `path` is the run's folder.
    """
    import pandas as pd

    from lra.runs.run_folder import load_records

    return pd.json_normalize(load_records(_paths(paths)))


class MarkdownTable(str):
    """Markdown that a notebook renders and `print` shows as text."""

    def _repr_markdown_(self) -> str:
        return str(self)


def table(paths: Paths = ("runs",), **options: Any) -> MarkdownTable:
    """The table of `lra table PATHS`.

    Args:
        options: `configs`, or `tasks`, `models`, `protocol`, `published`, `csv` and `metric`, as
            `lra.report.tables.make_table` takes them.
    """
    from lra.report.tables import comparison_table

    return MarkdownTable(comparison_table(_paths(paths), format="markdown", **options))


def _paths(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


__all__ = ["compose", "load", "load_run", "records", "table", "train"]
