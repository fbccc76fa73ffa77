"""Selects the runs behind each cell of a table: row names, best configuration, notes.

Runs of a task that differ in protocol, data source or data never share a row. If a model has
several configurations, the row shows the one with the best validation accuracy and says so.
"""

import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lra.config.compose import compose, upgrade_config
from lra.config.options import NOT_ARGUMENTS
from lra.config.rules import format_value
from lra.config.schema import RENAMED, keys_affecting
from lra.errors import ConfigError
from lra.runs.records import config_hash, to_json
from lra.runs.sanity import is_at_chance

Record = Mapping[str, Any]


def select_runs(records: Sequence[Record]) -> dict[tuple[str, str], tuple[list[Record], list[str]]]:
    """`best_configuration` of each (row name, task) among finished runs."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record, name in zip(records, row_names(records), strict=True):
        groups[name, record["task"]].append(record)
    return {key: best_configuration(group) for key, group in sorted(groups.items())}


def row_names(records: Sequence[Record]) -> list[str]:
    """The model of each record and, in brackets, what distinguishes its row."""
    protocols = {record["protocol"] for record in records}
    sources, keys = defaultdict(set), defaultdict(set)
    for record in records:
        source, key = data_source_and_key(record)
        sources[record["task"], record["protocol"]].add(source)
        keys[record["task"], record["protocol"], source].add(key)
    names = []
    for record in records:
        source, key = data_source_and_key(record)
        task, protocol = record["task"], record["protocol"]
        parts = [protocol] if len(protocols) > 1 else []
        parts += [source] if len(sources[task, protocol]) > 1 else []
        parts += ["partial data"] if (record.get("data") or {}).get("partial") else []
        parts += [f"data {key[:8]}"] if len(keys[task, protocol, source]) > 1 else []
        names.append(record["model"] + (f" [{', '.join(parts)}]" if parts else ""))
    return names


def best_configuration(group: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """One run for each seed of the configuration with the best validation accuracy, and notes."""
    configs: dict[str, dict[Any, Record]] = defaultdict(dict)
    for record in group:
        # upgraded, so that a key that is newer than the record makes no other configuration
        config = upgrade_config(record["config"])
        identity = config_hash(config, without=["seed", *keys_affecting("speed")])
        configs[identity][record["seed"]] = record

    def mean_val_accuracy(runs: Mapping[Any, Record]) -> float:
        return statistics.mean(accuracy_of(run, "val") or 0.0 for run in runs.values())

    best = list(max(configs.values(), key=mean_val_accuracy).values())
    notes = [f"best of {len(configs)} configurations by validation"] if len(configs) > 1 else []
    if any(map(selected_on_test, best)):
        notes.append(
            "weights chosen on the test split, which is all the validation this protocol has"
        )
    if (tried := tuning_runs(best)) > 1:
        notes.append(f"settings chosen by {tried} runs")
    if repeated := len(group) - sum(map(len, configs.values())):
        noun = "run" if repeated == 1 else "runs"
        notes.append(f"{repeated} repeated {noun} of the same seed left out")
    if changes := changed_defaults(best[0]):
        notes.append(f"made with other defaults than today's: {', '.join(changes)}")
    return best, notes


def changed_defaults(record: Record) -> list[str]:
    """Settings of a run for which its command gives other values today, as "key=old (today new)".

    Keys that only the record or only today's config has are new, removed or renamed: they do not
    count. Regular expressions of parameter groups do not count, because another spelling may
    select the same parameters. A command with a config folder of its user is not composed.
    """
    words = shlex.split(record.get("command") or "")[2:]  # without `lra train`
    if not words or any(word.startswith("-") for word in words):
        return []
    for old, new in RENAMED.items():
        words = [re.sub(rf"^{re.escape(old)}(?=[.=])", new, word) for word in words]
    if any(word.startswith("model.param_count=") for word in words):  # the search for it is slow
        words = [word for word in words if not word.startswith("model.param_count=")]
        words.append(f"backbone.width={record['config']['backbone']['width']}")
    try:
        config = to_json(OmegaConf.to_container(compose(words)))
    except ConfigError as error:
        return [f"its command is refused today ({error})"]
    recorded = _flat(upgrade_config(record["config"]))
    changed = []
    sections = ("task", "protocol", "model", "backbone", "optim", "trainer")
    for key, value in _flat({name: config[name] for name in sections}).items():
        _, name, *rest = key.split(".")
        if (
            recorded.get(key, value) != value
            and name not in NOT_ARGUMENTS  # their values are in the other sections
            and not name.startswith("_")
            and rest[-1:] != ["match"]
            and name != "no_decay"
            and key not in keys_affecting("speed", "start", "process")
        ):
            changed.append(f"{key}={_format(recorded[key])} (today {_format(value)})")
    return changed


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


# --- Fields of a record --------------------------------------------------------------------------


def is_scored(record: Record, split: str) -> bool:
    return record["status"] == "finished" and accuracy_of(record, split) is not None


def scores_of(record: Record, split: str) -> Mapping[str, Any]:
    return (record.get("metrics") or {}).get(split) or {}


def accuracy_of(record: Record, split: str) -> float | None:
    return scores_of(record, split).get("accuracy")


def data_source_and_key(record: Record) -> tuple[str, str]:
    data = record.get("data") or {}
    return str(data.get("source", "")), str(data.get("key", ""))


def selected_on_test(record: Record) -> bool:
    """Whether the weights were selected on a validation split that equals the test split."""
    splits = (record.get("data") or {}).get("splits") or {}
    if "val" not in splits or (record.get("selection") or {}).get("rule") != "best":
        return False
    return splits["val"]["sha256"] == splits["test"]["sha256"]


def tuning_runs(runs: Iterable[Record]) -> int:
    return max(run.get("tuning_runs") or 1 for run in runs)


def has_learned(record: Record, split: str = "test") -> bool | None:
    """Whether a run is better than chance: as recorded, else by the majority class.

    None if the record lacks these numbers.
    """
    if split == "test" and (recorded := record.get("learned")) is not None:
        return recorded
    majority = (record.get("reference") or {}).get("majority")
    count, accuracy = scores_of(record, split).get("count"), accuracy_of(record, split)
    if majority is None or not count or accuracy is None:
        return None
    return not is_at_chance(accuracy, majority, count)
