"""Long Range Arena in JAX: every task, every baseline, one trainer, honest tables.

splits = lra.load("listops", "strict")  # splits["train"].inputs (n, L), .lengths (n,), .labels (n,)
record = lra.train(["task=listops_short", "model=lru", "seed=1"])
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lra.data.store import Split


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


__all__ = ["compose", "load", "train"]
