"""Checks records: which of their claims hold, which do not, and which cannot be checked here."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lra.errors import LraError, MismatchError, RunFolderError
from lra.report.claims import OF_ALL_RUNS, RULES, Claim, Shared, Unchecked, fingerprints
from lra.runs.records import RECORD, read_record
from lra.runs.run_folder import record_files
from lra.training.recorder import CHECKPOINTS


@dataclass(frozen=True)
class Verdict:
    """The result of a check of one record.

    Attributes:
        passed: names of the rules that hold.
        failed: the reason for each rule that does not.
        unchecked: names of the rules for each reason why they could not be checked.
    """

    folder: Path
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __str__(self) -> str:
        parts = [f"{name}: {reason}" for name, reason in self.failed.items()]
        parts.append(f"checked: {', '.join(self.passed) or 'nothing'}")
        if self.unchecked:
            groups = (f"{', '.join(names)} ({why})" for why, names in self.unchecked.items())
            parts.append(f"not checked: {', '.join(groups)}")
        return f"{'FAIL' if self.failed else 'ok'} {self.folder}: {'; '.join(parts)}"


def check_records(
    paths: Sequence[str | Path],
    data_root: Path,
    *,
    rescore: int | None = None,
    allow_targets: Sequence[str] = (),
) -> Iterator[Verdict]:
    """The verdict on each record at or below some paths; the records are compared with each other.

    Args:
        data_root: folder of the data.
        rescore: number of runs whose weights score the test split again; None for all. The hashes
            of their configs choose them.
        allow_targets: classes outside `lra` and `models` that a record may name.

    Raises:
        RunFolderError: there is no record at or below one of the paths.
    """
    for path in paths:
        if not Path(path).exists() or {file.name for file in record_files([path])} != {RECORD}:
            raise RunFolderError(
                f"{path} holds no run; name a run folder such as "
                "runs/TASK/MODEL/strict-s0-1a2b3c4d, or a folder of runs"
            )
    folders = [file.parent for file in record_files(paths)]
    with_weights = [folder for folder in folders if (folder / CHECKPOINTS).is_dir()]
    with_weights.sort(key=lambda folder: folder.name.rpartition("-")[2])
    owners: dict[str, dict[int, Path]] = defaultdict(dict)
    digests = {folder: [*fingerprints(folder)] for folder in folders}
    for folder, found in digests.items():
        seed = seed_of(folder)
        for digest in found:
            owners[digest][seed] = folder
    shared = Shared(data_root, allow_targets, set(with_weights[:rescore]), digests, owners)
    for folder in folders:
        yield check_record(folder, shared)


def seed_of(folder: Path) -> int:
    """The seed of a run; -1 if its record is not valid."""
    try:
        return (read_record(folder) or {}).get("seed", -1)
    except RunFolderError:
        return -1


def check_record(folder: Path, shared: Shared) -> Verdict:
    """Applies all rules to a record; those that follow from the scores, if it is finished."""
    verdict = Verdict(folder)
    try:
        claim = Claim(folder, shared)
    except RunFolderError as error:
        verdict.failed["schema"] = str(error)
        return verdict
    verdict.passed.append("schema")
    for name, rule in RULES.items():
        try:
            if name not in OF_ALL_RUNS and claim.record["status"] != "finished":
                raise Unchecked(f"the run is {claim.record['status']}")
            rule(claim)
            verdict.passed.append(name)
        except (MismatchError, RunFolderError) as error:
            verdict.failed[name] = str(error)
            if name == "config":  # the other rules read it
                break
        except LraError as error:
            verdict.unchecked[str(error)].append(name)
        except Exception as error:  # a record of others must not end the check of the rest
            verdict.failed[name] = f"{type(error).__name__}: {error}"
    return verdict
