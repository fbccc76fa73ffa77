"""Selects the runs behind each cell of a table: row names, best configuration, notes.

Runs of a task that differ in protocol, data source or data never share a row. If a model has
several configurations, the row shows the one with the best validation accuracy among those with
most seeds, names its settings and counts the runs that competed. The count is derived here and not
written by a sweep, because a run cannot know the runs that another start or machine adds later.
"""

import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
MAX_SETTINGS = 200  # characters of a footnote; `lra table --configs` shows all


@dataclass(frozen=True)
class Selected:
    """The runs behind a cell, one for each seed of a configuration.

    Attributes:
        settings: those in which the configuration differs from others, as "key=value key=value".
        tuning_runs: number of runs among which validation chose the configuration, or the recorded
            number if that is larger.
    """

    runs: list[Record]
    notes: list[str]
    settings: str
    tuning_runs: int


def restricted(
    records: Iterable[Record],
    tasks: Sequence[str] | None,
    models: Sequence[str] | None,
    protocol: str | None,
) -> list[Record]:
    """The records of these tasks, models and protocol; None for all."""
    return [
        record
        for record in records
        if (tasks is None or record["task"] in tasks)
        and (models is None or record["model"] in models)
        and (protocol is None or record["protocol"] == protocol)
    ]


def select_runs(records: Sequence[Record]) -> dict[tuple[str, str], Selected]:
    """`best_configuration` of each (row name, task) among finished runs."""
    return {key: best_configuration(group) for key, group in grouped(records).items()}


def grouped(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each (row name, task), sorted by these."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record, name in zip(records, row_names(records), strict=True):
        groups[name, record["task"]].append(record)
    return dict(sorted(groups.items()))


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


def best_configuration(group: Sequence[Record]) -> Selected:
    """One run for each seed of the configuration with the best validation accuracy.

    Only configurations with the largest number of seeds compete, because the best of many single
    runs exceeds the mean of several seeds by luck.
    """
    configs = configurations(group)
    most = max(map(len, configs.values()))
    competing = [key for key, runs in configs.items() if len(runs) == most]
    winner = max(competing, key=lambda key: mean_val_accuracy(configs[key]))
    best, settings = configs[winner], distinguishing_settings(configs)[winner]
    distinct = sum(map(len, configs.values()))
    recorded, notes = max(run.get("tuning_runs") or 1 for run in best), []
    if len(configs) > 1:
        shown = settings if len(settings) <= MAX_SETTINGS else f"{settings[:MAX_SETTINGS]} ..."
        notes.append(f"best of {len(configs)} configurations by validation: {shown}")
        if fewer := len(configs) - len(competing):
            notes[-1] += f"; {fewer} with fewer than {most} seeds did not compete"
    if any(map(selected_on_test, best)):
        notes.append(
            "weights chosen on the test split, which is all the validation this protocol has"
        )
    if recorded > 1:
        notes.append(f"settings chosen by {recorded} runs")
    if repeated := len(group) - distinct:
        noun = "run" if repeated == 1 else "runs"
        notes.append(f"{repeated} repeated {noun} of the same seed left out")
    if changes := changed_defaults(best[0]):
        notes.append(f"made with other defaults than today's: {', '.join(changes)}")
    competed = distinct if len(configs) > 1 else 1
    return Selected(best, notes, settings, max(recorded, competed))


def configurations(group: Sequence[Record]) -> dict[str, list[Record]]:
    """One run for each seed of each configuration, by the hash of the configuration."""
    configs: dict[str, dict[Any, Record]] = defaultdict(dict)
    for record in group:
        # upgraded, so that a key that is newer than the record makes no other configuration
        config = upgrade_config(record["config"])
        identity = config_hash(config, without=["seed", *keys_affecting("speed")])
        configs[identity][record["seed"]] = record
    return {identity: list(runs.values()) for identity, runs in configs.items()}


def mean_val_accuracy(runs: Iterable[Record]) -> float:
    """Mean over runs; a run without a score counts as 0."""
    return statistics.mean(accuracy_of(run, "val") or 0.0 for run in runs)


def distinguishing_settings(configs: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """The settings of each configuration in which any two of them differ."""
    flat = {key: _flat(upgrade_config(runs[0]["config"])) for key, runs in configs.items()}
    first, *others = flat.values()
    ignored = {"seed", *keys_affecting("speed", "start", "process")}
    differing = [
        key
        for key in dict.fromkeys(key for values in flat.values() for key in values)
        if key not in ignored and any(values.get(key) != first.get(key) for values in others)
    ]
    # the sections that the harness reads are defaults of other keys, which differ too
    arguments = [key for key in differing if not {*key.split(".")[1:2]} & {*NOT_ARGUMENTS}]
    return {
        name: " ".join(f"{key}={_format(values.get(key))}" for key in arguments or differing)
        for name, values in flat.items()
    }


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
