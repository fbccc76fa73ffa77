"""The claims of a record, and the rules that derive them again.

A rule of `RULES` returns if its claim holds. It raises `Unchecked` if the claim can be neither
confirmed nor refuted here, and MismatchError or RunFolderError if it is wrong. The rules that
differ by protocol are those of conf/protocol/NAME.yaml.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lra.config.messages import translated_errors
from lra.config.options import CONF, options
from lra.config.rules import format_value
from lra.data.inspect import expected_hashes, generated_rows
from lra.data.packed import Split, describe_split
from lra.data.store import settings_name
from lra.errors import ConfigError, DataError, LraError, MismatchError, RunFolderError
from lra.report.evaluate import rescore
from lra.report.saved_run import SavedRun, check_scores, resolved_config
from lra.report.selection import scores_of, split_hash
from lra.runs import records, sanity
from lra.runs.machine import has_commit
from lra.tasks.base import SPLITS
from lra.training.evaluation import sample_rows, score
from lra.training.recorder import CHECKPOINTS, data_key, describe_data
from lra.training.trainer import intervals

MAX_GENERATED = 1_000_000  # test examples that a check generates
RESUMED_ACCURACY = 0.01  # validation accuracy may differ on the device of a resumed run


class Unchecked(LraError):
    """A claim that can be neither confirmed nor refuted here."""


@dataclass(frozen=True)
class DataHere:
    """The data of a task as they can be had here.

    Attributes:
        source: generated, release or tfds.
        splits: count and sha256 of the known splits.
    """

    source: str
    splits: Mapping[str, Mapping[str, Any]]
    test: Split


@dataclass(frozen=True)
class Shared:
    """What the checked records have in common.

    Attributes:
        allow_targets: classes outside `lra` and `models` that a record may name.
        rescored: folders of the runs whose weights score the test split again.
        fingerprints: of each run, by folder.
        owners: folder by seed of each fingerprint.
        data: by settings of the task, filled on first use.
    """

    data_root: Path
    allow_targets: Sequence[str]
    rescored: set[Path]
    fingerprints: Mapping[Path, Sequence[str]]
    owners: Mapping[str, Mapping[int, Path]]
    data: dict[str, DataHere] = field(default_factory=dict)


class Claim:
    """A record under check, and what its rules compare it with, read on first use.

    Raises RunFolderError if there is no valid record.
    """

    def __init__(self, folder: Path, shared: Shared):
        self.folder, self.shared = folder, shared
        self.record = records.read_record(folder) or {}
        if not self.record:
            raise RunFolderError(f"{folder} has no {records.RECORD}")
        root = json.dumps(str(shared.data_root))  # quoted, because a value is read as YAML
        self.overrides = [f"data.root={root}", "data.download=false"]

    @cached_property
    def cfg(self) -> Any:
        with translated_errors(self.overrides):
            return resolved_config(self.record, self.overrides)

    @cached_property
    def run(self) -> SavedRun:
        return SavedRun(self.folder, self.overrides, allow_targets=self.shared.allow_targets)

    @cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        if (stored := records.read_predictions(self.folder)) is None:
            raise MismatchError(f"{records.PREDICTIONS} is missing")
        return stored

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return records.read_metrics(self.folder)

    @cached_property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, accuracy) of each evaluation on validation; Unchecked if a resume lost lines."""
        if lost := self.record.get("lost_metrics"):
            raise Unchecked(f"{records.METRICS} lost {lost} lines at a resume")
        return [
            (x["step"], x["val/accuracy"])
            for x in self.metrics
            if x.get("val/accuracy") is not None
        ]

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """The recorded values of the protocol; those that the record lacks are of conf/protocol."""
        return dict(option_of("protocol", self.record["protocol"])) | dict(self.cfg.protocol)

    @property
    def data(self) -> DataHere:
        """Raises Unchecked if the data are neither here nor generated."""
        key = settings_name(self.run.task)
        if key not in self.shared.data:
            self.shared.data[key] = data_here(self.run)
        return self.shared.data[key]


def data_here(run: SavedRun) -> DataHere:
    """The prepared data of a run's task, or the test split alone if it can be generated."""
    task, root = run.task, Path(run.cfg.data.root)
    count = (task.split_sizes() or {}).get("test")
    if count is not None and count > MAX_GENERATED:
        raise Unchecked(f"{count:,} test examples, more than {MAX_GENERATED:,}, are not generated")
    test = None if count is None else generated_rows(task, "test", count, root)
    if test is not None:
        entry = describe_split(test, task.num_classes)
        return DataHere("generated", {"test": {k: entry[k] for k in ("count", "sha256")}}, test)
    try:
        found = describe_data(run.store)
    except DataError as error:
        raise Unchecked(f"data absent: {error}") from None
    return DataHere(found["source"], found["splits"], run.store.splits["test"])


def fingerprints(folder: Path) -> Iterator[str]:
    """Hashes of a run's test logits and of its validation losses, which depend on the seed."""
    try:
        stored, lines = records.read_predictions(folder), records.read_metrics(folder)
    except RunFolderError:  # another rule reports it
        return
    losses = [x["val/loss"] for x in lines if x.get("val/loss") is not None]
    contents = [stored["logits"].tobytes() if stored else b"", np.array(losses).tobytes()]
    yield from (hashlib.sha256(content).hexdigest() for content in contents if content)


def require(what: str, stated: Any, found: Any, origin: str) -> None:
    """Raises MismatchError unless two values are equal."""
    if stated != found:
        raise MismatchError(f"{what} is {format_value(stated)}, {origin} {format_value(found)}")


def check_config(claim: Claim) -> None:
    """The config is valid, and its seed is that of the record."""
    try:
        require("seed", claim.record["seed"], claim.cfg.seed, "that of the config")
    except ConfigError as error:
        raise MismatchError(str(error)) from None


def check_folder(claim: Claim) -> None:
    """The name of the folder has the protocol, the seed and the hash of the config."""
    name = Path(os.path.realpath(claim.folder)).name
    found = records.run_path("", claim.record["config"], claim.record).name
    require("the folder", name, found, "that of its config")


def option_of(group: str, name: str) -> Any:
    """The file of an option; empty if conf/ has none."""
    known = name in options(group)
    return OmegaConf.load(CONF / group / f"{name}.yaml") if known else OmegaConf.create({})


def check_option(claim: Claim, group: str, keys: Sequence[str] | None) -> None:
    """The config has the values of the option that the record names; None for all keys."""
    name, section = claim.record[group], claim.record["config"][group]
    if not (option := option_of(group, name)):
        raise Unchecked(f"conf/{group} has no {name}")
    for key in section.keys() & option.keys() & set(keys or section):
        require(f"{group}.{key}", section[key], option[key], f"conf/{group}/{name}.yaml has")


def check_protocol(claim: Claim) -> None:
    """The config has the values of the named protocol, and validation is not test under strict."""
    val, test = (split_hash(claim.record, name) for name in ("val", "test"))
    if claim.protocol.get("validation") == "train" and val is not None and val == test:
        raise MismatchError("validation equals test, the protocol takes it from train")
    check_option(claim, "protocol", None)


def check_steps(claim: Claim) -> None:
    """The run took the steps of its config, and metrics.jsonl has every evaluation."""
    record, trainer = claim.record, claim.cfg.trainer
    every, end = intervals(trainer)["eval"], trainer.steps
    steps = [step for step, _ in claim.evaluations]
    if trainer.eval_every is None and steps[:1] == [max(trainer.steps // 20, 1)]:
        every = steps[0]  # the default of earlier versions
    if (early := record.get("stopped_early")) and steps:
        end, best = steps[-1], best_of(claim.evaluations)[0]
        found = sanity.stopped_early(end, best, every, trainer.early_stopping)
        require("stopped_early.step", early.get("step"), (found or {}).get("step"), "metrics give")
    require("step", record.get("step"), end, "the config gives")
    expected = range(every, end + 1, every)
    if len(steps) != len(expected) + (end % every > 0) or {*steps} != {*expected, end}:
        raise MismatchError(
            f"{records.METRICS} has evaluations at {len(steps)} steps, expected one each {every} "
            f"steps up to {end}"
        )


def check_selection(claim: Claim) -> None:
    """The scored weights are those that the protocol selects by validation, and test is unseen."""
    if any(key.startswith("test") for x in claim.metrics for key in x):
        raise MismatchError(f"{records.METRICS} has scores of test, which is scored once")
    if not claim.evaluations:
        raise MismatchError(f"{records.METRICS} has no evaluation")
    record, rule, last = claim.record, claim.protocol.get("select"), claim.evaluations[-1]
    step, accuracy = best_of(claim.evaluations) if rule == "best" else last
    found = {"rule": rule, "step": step, "val_accuracy": accuracy}
    found |= {"last_step": last[0], "last_val_accuracy": last[1]}
    for key, value in found.items():
        stated = (record.get("selection") or {}).get(key)
        require(f"selection.{key}", stated, value, f"{records.METRICS} gives")
    stated = scores_of(record, "val").get("accuracy")
    tolerance = RESUMED_ACCURACY if record.get("resumed_from") else 1e-9
    if stated is None or abs(stated - accuracy) > tolerance:
        raise MismatchError(
            f"metrics.val.accuracy is {stated}, the selected weights have {accuracy}"
        )


def best_of(evaluations: list[tuple[int, float]]) -> tuple[int, float]:
    return max(evaluations, key=lambda evaluation: evaluation[1])  # the first of equals


def check_test_scores(claim: Claim) -> None:
    """The test scores are those of predictions.npz."""
    stored, recorded = claim.predictions, scores_of(claim.record, "test")
    found = score(stored["logits"], stored["labels"])
    if missing := [name for name in found if recorded.get(name) is None]:
        raise MismatchError(f"metrics.test lacks {', '.join(missing)}")
    check_scores(recorded, found, f"the logits in {records.PREDICTIONS}")
    if (learned := claim.record.get("learned")) is not None:
        chance = sanity.chance(stored["labels"], stored["logits"].shape[-1])
        better = not sanity.is_at_chance(found["accuracy"], chance, stored["labels"].size)
        require("learned", learned, better, f"{records.PREDICTIONS} gives")


def check_rows(claim: Claim) -> None:
    """The predictions are of the whole test split, each example once."""
    data, rows = claim.record.get("data") or {}, claim.predictions["rows"]
    count = (data.get("splits") or {}).get("test", {}).get("count")
    limit = claim.cfg.trainer.eval_examples
    if limit is not None and count is not None and limit < count:
        require("data.partial", data.get("partial"), True, "with trainer.eval_examples it is")
        raise Unchecked(f"the run scored {len(rows):,} of {count:,} test examples")
    if count is None or not np.array_equal(rows, np.arange(count)):
        raise MismatchError(
            f"{records.PREDICTIONS} has {len(rows):,} rows up to {rows[-1]:,}, expected each of "
            f"the {count} rows of test once"
        )


def check_split(claim: Claim, name: str) -> None:
    """The hash and the count of a split are those of the data here or of the published hashes."""
    data, task = claim.record.get("data") or {}, claim.run.task
    splits = data.get("splits") or {}
    if any("sha256" not in splits.get(split, {}) for split in SPLITS):
        raise MismatchError("data.splits lacks a hash")
    require("data.key", data.get("key"), data_key(splits), "its splits give")
    if claim.cfg.data.allow_partial and data.get("partial"):
        raise Unchecked("partial data")
    what, stated = f"data.splits.{name}", splits[name]
    if name != "train" and (sizes := task.split_sizes()):  # a release of Pathfinder lacks a picture
        require(f"{what}.count", stated.get("count"), sizes[name], "the task has")
    if data.get("source") != "tfds" and (published := expected_hashes(task)):
        where = "lra/data/checksums.json has"
        require(f"{what}.sha256", stated["sha256"], published[name], where)
        return
    here = claim.data
    if data.get("source") != here.source:
        kind = MismatchError if "generated" in (data.get("source"), here.source) else Unchecked
        raise kind(f"data.source is {data.get('source')}, that of the data here {here.source}")
    if name not in here.splits:
        raise Unchecked("`lra data prepare` makes it")
    for key, value in here.splits[name].items():
        require(f"{what}.{key}", stated.get(key), value, "that of the data here")


def check_labels(claim: Claim) -> None:
    """The labels of the predictions are those of the test split made again."""
    test, stored = claim.data.test, claim.predictions
    how = (claim.record.get("data") or {}).get("sample", "first")
    rows = sample_rows(test.labels, claim.cfg.trainer.eval_examples, how)
    if not np.array_equal(rows, stored["rows"]):
        raise MismatchError(f"the rows in {records.PREDICTIONS} are not those of the test split")
    if not np.array_equal(test.labels[rows], stored["labels"]):
        raise MismatchError(f"the labels in {records.PREDICTIONS} are not those of the test split")


def check_seeds(claim: Claim) -> None:
    """No run of another seed has the same logits or the same validation losses."""
    owners = claim.shared.owners
    if len({seed for seeds in owners.values() for seed in seeds}) < 2:
        raise Unchecked("no other seed is there")
    for digest in claim.shared.fingerprints[claim.folder]:
        for seed, folder in owners[digest].items():
            if seed != claim.record["seed"]:
                raise MismatchError(
                    f"the test logits or validation losses are those of {folder}, seed {seed}"
                )


def check_commit(claim: Claim) -> None:
    """The commits of all parts of the run exist in this checkout."""
    parts = [claim.record, *(claim.record.get("segments") or [])]
    commits = {part["commit"] for part in parts if part.get("commit")}
    for commit in sorted(commits):
        if not re.fullmatch(r"[0-9a-f]{7,64}(\+dirty)?", commit):
            raise MismatchError(f"{commit!r} is no commit")
        if (found := has_commit(commit.removesuffix("+dirty"))) is None:
            raise Unchecked("no git history here")
        if not found:
            raise MismatchError(f"there is no commit {commit} in this checkout")
    if not commits or any(commit.endswith("+dirty") for commit in commits):
        raise Unchecked("uncommitted changes" if commits else "none is recorded")


def check_weights(claim: Claim) -> None:
    """The saved weights are of the selected step and size, and give the stored predictions."""
    if not (claim.folder / CHECKPOINTS).is_dir():
        raise Unchecked("none are kept")
    if claim.folder not in claim.shared.rescored:
        raise Unchecked("not in the sample")
    run = claim.run
    run.whole_split = claim.data.test
    require("selection.step", run.recorded_step, run.weights_step, "the weights are of")
    found = sum(group.num_params for group in run.setup.groups)
    stated = (claim.record.get("params") or {}).get("total")
    require("params.total", stated, found, "the model has")
    rescore(run)


RULES: Mapping[str, Callable[[Claim], None]] = {
    "config": check_config,
    "folder": check_folder,
    "task": partial(check_option, group="task", keys=("_target_", "name")),
    "model": partial(check_option, group="model", keys=("_target_",)),
    "protocol": check_protocol,
    "commit": check_commit,
    "steps": check_steps,
    "selection": check_selection,
    "test scores": check_test_scores,
    "rows": check_rows,
    **{f"{name} data": partial(check_split, name=name) for name in SPLITS},
    "labels": check_labels,
    "seeds": check_seeds,
    "weights": check_weights,
}
OF_ALL_RUNS = ("config", "folder", "task", "model", "protocol", "commit")
