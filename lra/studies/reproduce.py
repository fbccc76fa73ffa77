"""`lra reproduce`: the studies, their settings, and the folder that each of them writes."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lra.errors import ConfigError, LraError
from lra.files import disk_errors
from lra.runs.console import printable
from lra.runs.machine import cores, cpu_name, git_commit, versions
from lra.studies import filters, gap, learning
from lra.studies.figures import paper_style
from lra.studies.output import Output

ROOT, QUICK_ROOT = Path("results/reproduce"), Path("results/reproduce_quick")


@dataclasses.dataclass(frozen=True)
class Study:
    """One question, its figure and the settings of both sizes.

    `version` rises when the code of the study changes its numbers: it enters the hash that a
    record carries, so that `lra reproduce` lists older results as such.
    """

    about: str
    cost: str  # on two CPU cores
    make: Callable[..., Output]
    full: dict[str, Any]
    quick: dict[str, Any]
    version: int = 1

    def settings_hash(self, settings: dict[str, Any]) -> str:
        text = json.dumps([self.version, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


LDS = {"length": 1000, "steps": 1000, "seeds": 5, "filters": (1, 5, 10, 15, 20, 25, 30), "most": 25}
LDS |= {"settings": 200}
QUICK_LDS = {"length": 40, "steps": 12, "seeds": 2, "filters": (1, 4), "most": 4, "settings": 3}

STUDIES = {
    "fig1": Study(
        "the spectral filters",
        "5 s",
        filters.fig1,
        {"length": 1000, "filters": 6},
        {"length": 64, "filters": 3},
    ),
    "spectrum": Study(
        "decay of sigma_k against its bound; filters that a tolerance needs against L",
        "10 s",
        filters.spectrum,
        {
            "lengths": (256, 1024, 4096, 16_384),
            "filters": 40,
            "tolerances": (1e-2, 1e-3, 1e-4, 1e-6),
        },
        {"lengths": (32, 64), "filters": 12, "tolerances": (1e-2,)},
    ),
    "fig3": Study(
        "one STU and one LRU layer on a marginally stable system; error against K",
        "4 min with fig5 and fig6",
        learning.fig3,
        LDS,
        QUICK_LDS,
    ),
    "fig5": Study(
        "learning rates of both layers", "shared with fig3", learning.fig5, LDS, QUICK_LDS
    ),
    "fig6": Study(
        "200 settings of the LRU against the STU",
        "shared with fig3",
        learning.fig6,
        LDS,
        QUICK_LDS,
    ),
    "gap": Study(
        "prediction error against the spectral gap, at an equal number of parameters",
        "1 min",
        gap.gap,
        {"length": 16_384, "tests": 2, "lru_steps": 300, "kalman_steps": 1000, "seed": 0},
        {"length": 160, "tests": 1, "lru_steps": 2, "kalman_steps": 20, "seed": 0},
    ),
    "theory": Study(
        "theorems 3.1 and 5.1 and their lemmas, checked in numbers",
        "10 s",
        filters.theory,
        {
            "lengths": (256, 1024),
            "filters": (2, 5, 10, 15, 20, 25),
            "systems": 10,
            "states": 16,
            "seed": 0,
        },
        {"lengths": (64,), "filters": (2, 5), "systems": 2, "states": 4, "seed": 0},
    ),
}


def list_studies(root: Path = ROOT) -> Iterator[str]:
    """One line for each study: name, what it shows, cost and state of its results."""
    for name, study in STUDIES.items():
        yield f"{name:<9} {study.about} ({study.cost}): {state(root / name, study)}"


def state(folder: Path, study: Study) -> str:
    try:
        record = json.loads((folder / "record.json").read_text())
        if record["settings_hash"] == study.settings_hash(study.full):
            return printable(f"done, commit {record['commit']}")
        return "results of an older version or of other settings"
    except (OSError, ValueError, KeyError, TypeError):
        return "not done"


def reproduce(
    names: Sequence[str], root: Path | None = None, *, quick: bool = False, format: str = "png"
) -> Iterator[str]:
    """Makes the studies and replaces their folders; yields a line for each.

    Raises:
        ConfigError: an unknown name.
        LraError: the folder of a study holds something else than its results.
    """
    unknown = [name for name in names if name not in (*STUDIES, "all")]
    if unknown:
        raise ConfigError(f"no study {unknown[0]}; known: {', '.join(STUDIES)}, all")
    root = root or (QUICK_ROOT if quick else ROOT)
    for name in STUDIES if "all" in names else dict.fromkeys(names):
        study, started, cpu = STUDIES[name], time.perf_counter(), time.process_time()
        if (root / name).exists() and not (root / name / "record.json").is_file():
            raise LraError(f"{root / name} has no record.json; move it or set another --output")
        settings = study.quick if quick else study.full
        with paper_style():
            output = study.make(**settings)
            record = {
                "study": name,
                "about": study.about,
                "settings": settings,
                "settings_hash": study.settings_hash(settings),
                "quick": quick,
                "command": f"lra reproduce {name}{' --quick' if quick else ''}",
                "commit": git_commit(),
                "versions": versions(),
                "device": device(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "wall_s": round(time.perf_counter() - started, 1),
                "cpu_s": round(time.process_time() - cpu, 1),
                "numbers": output.numbers,
            }
            with replaced_folder(root / name) as folder:
                output.figure.savefig(folder / f"{name}.{format}")
                if format != "png":
                    output.figure.savefig(folder / f"{name}.png")
                for table, rows in output.tables.items():
                    frame = pd.DataFrame(rows)
                    frame.to_csv(folder / f"{table}.csv", index=False, float_format="%.6g")
                text = json.dumps(record, indent=1, default=float)
                (folder / "record.json").write_text(text + "\n")
        yield f"{name}: {root / name}, {record['wall_s']:g} s ({record['cpu_s']:g} s of CPU)"


def device() -> str:
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {cpu_name()}, {cores()} cores"


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder that replaces `folder` as a whole when the block ends without error."""
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors(folder, "--output"):
        new.mkdir(parents=True)
        try:
            yield new
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
