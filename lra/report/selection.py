"""Selects the runs behind each cell of a table: row names, best configuration, notes.

Runs of a task that differ in protocol, data source or data never share a row. If a model has
several configurations, the row shows the one with the best validation accuracy among those with
most seeds, names its settings and counts the runs that competed. The count is derived here and not
written by a sweep, because a run cannot know the runs that another start or machine adds later.
"""

import json
import logging
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lra.config.compose import upgrade_config
from lra.config.options import NOT_ARGUMENTS
from lra.config.rules import format_value
from lra.config.schema import keys_affecting
from lra.errors import RunFolderError
from lra.runs.records import RECORD, config_hash, read_predictions
from lra.runs.sanity import is_at_chance

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
MAX_SETTINGS = 200  # characters of a footnote; `lra table --configs` shows all

WITHOUT_EFFECT = {*keys_affecting("speed", "start", "process")}


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
    """`best_configuration` of each (row name, task) among finished runs.

    A run whose predictions are damaged, or do not give its recorded accuracy, is left out with a
    warning. Only runs that would be shown are compared, because reading all predictions takes long.
    """
    selected = {}
    for key, group in grouped(records).items():
        while group:
            best = best_configuration(group)
            if not (wrong := list(filter(contradicts_predictions, best.runs))):
                selected[key] = best
                break
            group = [record for record in group if record not in wrong]
    return selected


def grouped(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each (row name, task), sorted by these."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record, name in zip(records, row_names(records), strict=True):
        groups[name, record["task"]].append(record)
    return dict(sorted(groups.items()))


def contradicts_predictions(record: Record) -> bool:
    """Whether predictions.npz of a run is damaged or gives another accuracy; warns if so."""
    accuracy = accuracy_of(record, "test")
    try:
        stored = read_predictions(record["path"]) if "path" in record else None
    except RunFolderError as error:
        log.warning("skipped: %s", error)
        return True
    if stored is None or accuracy is None:
        return False
    found = float((stored["logits"].argmax(axis=-1) == stored["labels"]).mean())
    if abs(found - accuracy) <= 1e-9:
        return False
    log.warning(
        "skipped: %s states a test accuracy of %.4f, but its predictions.npz gives %.4f",
        Path(record["path"]) / RECORD,
        accuracy,
        found,
    )
    return True


def row_names(records: Sequence[Record]) -> list[str]:
    """The model of each record and, in brackets, what distinguishes its row."""
    protocols = {record["protocol"] for record in records}
    sources, keys, samples = defaultdict(set), defaultdict(set), defaultdict(set)
    for record in records:
        source, key = data_source_and_key(record)
        sources[record["task"], record["protocol"]].add(source)
        keys[record["task"], record["protocol"], source].add(key)
        samples[record["task"], record["protocol"], source, key].add(sample_of(record))
    names = []
    for record in records:
        source, key = data_source_and_key(record)
        task, protocol = record["task"], record["protocol"]
        parts = [protocol] if len(protocols) > 1 else []
        parts += [source] if len(sources[task, protocol]) > 1 else []
        parts += ["partial data"] if (record.get("data") or {}).get("partial") else []
        parts += [f"data {key[:8]}"] if len(keys[task, protocol, source]) > 1 else []
        sample, found = sample_of(record), samples[task, protocol, source, key]
        parts += [f"{sample} examples"] if sample and len(found - {None}) > 1 else []
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
    competed = distinct if len(configs) > 1 else 1
    return Selected(best, notes, settings, max(recorded, competed))


def configurations(group: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """One run for each seed of each configuration."""
    configs: dict[tuple[str, ...], dict[Any, Record]] = defaultdict(dict)
    for record in group:
        configs[configuration(record["config"])][record["seed"]] = record
    return {identity: list(runs.values()) for identity, runs in configs.items()}


def mean_val_accuracy(runs: Iterable[Record]) -> float:
    """Mean over runs; a run without a score counts as 0."""
    return statistics.mean(accuracy_of(run, "val") or 0.0 for run in runs)


def distinguishing_settings(
    configs: Mapping[tuple[str, ...], Sequence[Record]],
) -> dict[tuple[str, ...], str]:
    """The settings of each configuration in which any two of them differ."""
    flat = {key: _flat(upgrade_config(runs[0]["config"])) for key, runs in configs.items()}
    first, *others = flat.values()
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [
        key
        for key in keys
        if key not in WITHOUT_EFFECT
        and key != "seed"
        and any(values.get(key) != first.get(key) for values in others)
    ]
    # the sections that the harness reads are defaults of other keys, which differ too
    arguments = [key for key in differing if not {*key.split(".")[1:2]} & {*NOT_ARGUMENTS}]
    return {
        name: " ".join(f"{key}={_format(values.get(key))}" for key in arguments or differing)
        for name, values in flat.items()
    }


def configuration(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Identifies what a recorded config computes, except for its seed.

    A key that is newer than the record makes no other configuration. Sections are hashed one by
    one, because the runs of a sweep share most of them.
    """
    return tuple(
        _section_hash(name, json.dumps(value))
        for name, value in sorted(config.items())
        if name != "seed" and name not in WITHOUT_EFFECT
    )


@cache
def _section_hash(name: str, text: str) -> str:
    config = upgrade_config({name: json.loads(text)})
    return config_hash(config, without=keys_affecting("speed"))


def command_words(record: Record) -> list[str]:
    """The words of a run's command without `lra train`; none if it is no shell command."""
    try:
        return shlex.split(record.get("command") or "")[2:]
    except ValueError:
        return []


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


def split_hash(record: Record, name: str) -> str | None:
    """The recorded SHA-256 of a split's contents."""
    splits = (record.get("data") or {}).get("splits") or {}
    return (splits.get(name) or {}).get("sha256")


def sample_of(record: Record) -> str | None:
    """How a run chose the examples that it scored; None for all of them."""
    data = record.get("data") or {}
    return data.get("sample", "first") if data.get("partial") else None


def selected_on_test(record: Record) -> bool:
    """Whether the weights were selected on a validation split that equals the test split."""
    val, test = split_hash(record, "val"), split_hash(record, "test")
    rule = (record.get("selection") or {}).get("rule")
    return rule == "best" and val is not None and val == test


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
