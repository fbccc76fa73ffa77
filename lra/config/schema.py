"""Valid ranges and choices of config keys. Tasks and models validate their own arguments."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lra.errors import ConfigError


class Range(NamedTuple):
    """The numbers that a key takes: an interval such as "[0, 1)", in none of which lie inf and NaN."""

    interval: str
    whole: bool = False
    optional: bool = False  # or null
    words: tuple[str, ...] = ()  # or one of these

    def check(self, key: str, value: Any) -> None:
        """Raises: ConfigError, if `value` is none of them."""
        low, high = self.interval[1:-1].split(", ")
        if (value is None and self.optional) or value in self.words:
            return
        if isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool):
            above = float(low) < value or (self.interval[0] == "[" and value == float(low))
            below = value < float(high) or (self.interval[-1] == "]" and value == float(high))
            if above and below:
                return
        kind = "whole " if self.whole else "finite " if value == math.inf else ""
        bound = f"{'of at least' if self.interval[0] == '[' else 'above'} {low}"
        expected = f"a {kind}number {bound if high == 'inf' else f'in {self.interval}'}"
        others = [*self.words, *["null"] * self.optional]
        raise ConfigError(f"{key}={format_value(value)} must be {' or '.join([expected, *others])}")


# what the harness asks of numbers; a task's and a model's own are their constructors' business
RANGES = {
    "seed": Range("[0, 4294967295]", whole=True),  # JAX would silently take it modulo 2^32
    "tuning_runs": Range("[1, inf)", whole=True),
    "task.sizes.train": Range("[1, inf)", whole=True),
    "task.sizes.val": Range("[1, inf)", whole=True),
    "task.sizes.test": Range("[1, inf)", whole=True),
    "backbone.depth": Range("[1, inf)", whole=True),
    "backbone.width": Range("[1, inf)", whole=True),
    "backbone.dropout": Range("[0, 1)"),
    "backbone.embedding_dropout": Range("[0, 1)"),
    "backbone.norm_momentum": Range("[0, 1)"),
    "backbone.mlp_ratio": Range("(0, inf)"),
    "optim.lr": Range("(0, inf)"),
    "optim.weight_decay": Range("[0, inf)"),
    "optim.b1": Range("[0, 1)"),
    "optim.b2": Range("[0, 1)"),
    "optim.eps": Range("(0, inf)"),
    "optim.warmup": Range("[0, 1]"),
    "optim.lr_start": Range("[0, inf)"),
    "optim.lr_end": Range("[0, inf)"),
    "optim.clip": Range("(0, inf)", optional=True),
    "optim.plateau.factor": Range("(0, 1)"),
    "optim.plateau.patience": Range("[0, inf)", whole=True),
    "optim.plateau.threshold": Range("[0, 1)"),
    "optim.ema": Range("(0, 1)", optional=True),
    "optim.label_smoothing": Range("[0, 1)"),
    "trainer.steps": Range("[1, inf)", whole=True),
    "trainer.batch_size": Range("[1, inf)", whole=True),
    "trainer.micro_batch": Range("[1, inf)", whole=True, optional=True, words=("auto",)),
    "trainer.devices": Range("[1, inf)", whole=True, optional=True),
    "trainer.distributed_timeout": Range("[1, inf)", whole=True),
    "trainer.eval_batch_size": Range("[1, inf)", whole=True),
    "trainer.train_eval_examples": Range("[1, inf)", whole=True),
    "trainer.eval_examples": Range("[1, inf)", whole=True, optional=True),
    "trainer.eval_every": Range("[1, inf)", whole=True, optional=True),
    "trainer.early_stopping": Range("[1, inf)", whole=True, optional=True),
    "trainer.first_loss_tolerance": Range("(1, inf)", optional=True),
    "trainer.chance_after": Range("[0, 1]", optional=True),
    "trainer.checkpoint_every": Range("[1, inf)", whole=True, optional=True),
    "trainer.log_every": Range("[1, inf)", whole=True, optional=True),
    "trainer.call_seconds": Range("(0, inf)"),
}

# sections that a record of an older version may hold in part
FILLED = ("backbone", "optim", "trainer", "data", "tracker")

# keys that take one word of a few
WORDS = {
    "optim.schedule": ("cosine", "linear", "rsqrt", "constant", "plateau"),
    "optim.plateau.metric": ("accuracy", "loss"),
    "trainer.precision": ("float32", "tf32", "bf16"),
    "trainer.remat": (
        *("none", "block", "dots", "everything_saveable", "nothing_saveable", "dots_saveable"),
        "dots_with_no_batch_dims_saveable",
    ),
    "data.placement": ("auto", "device", "host"),
}


def check_ranges(section: Mapping[Any, Any], prefix: str = "") -> None:
    """Refuse a number outside of `RANGES` and a word that is none of `WORDS`.

    `prefix` is the dotted_keys key of `section`, with a dot at its end.
    """
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            check_ranges(value, f"{key}.")
        elif key in RANGES:
            RANGES[key].check(key, value)
        elif key in WORDS and value not in WORDS[key]:
            raise ConfigError(
                f"{key}={format_value(value)} is unknown; choose one of {', '.join(WORDS[key])}"
            )


def format_value(value: Any) -> str:
    """`value` as one types it."""
    return (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )
