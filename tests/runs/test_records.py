"""Reading a run folder's files, JSON conversion, and the hash that identifies a run."""

import json
from pathlib import Path

import numpy as np
import pytest

from lra.errors import RunFolderError
from lra.runs import records
from lra.runs.records import config_hash, read_record, run_path, to_json

ROOT = Path(__file__).resolve().parents[2]


def test_a_broken_line_before_the_last_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        records.read_metrics(tmp_path)


def test_files_that_do_not_exist_yet_read_as_none_or_empty(tmp_path):
    assert records.read_record(tmp_path) is None
    assert records.read_metrics(tmp_path) == []
    assert records.read_predictions(tmp_path) is None


def test_json_has_no_nan_arrays_or_paths():
    given = {
        "a": np.float32(0.5),
        "nan": float("nan"),
        3: np.arange(2),
        "p": Path("x"),
        "t": (1, None),
    }
    assert to_json(given) == {"a": 0.5, "nan": None, "3": [0, 1], "p": "x", "t": [1, None]}
    with pytest.raises(TypeError, match="no JSON form"):
        to_json({"f": object()})


def test_the_identity_of_a_run_ignores_where_it_runs():
    config = {
        "seed": 0,
        "optim": {"lr": 1e-3, "betas": (0.9, 0.999), "clip": 1.0},
        "data": {"root": "/a", "seed": 1},
        "output": {"root": "runs"},
        "resume": "never",
        "tracker": {"wandb": "off"},
        "tuning_runs": 1,
    }
    same = {
        **config,
        "data": {"seed": 1, "root": "/b"},
        "output": {"root": "/scratch"},
        "resume": "auto",
        "tracker": {"wandb": "online"},
        "tuning_runs": 9,
        "optim": {"clip": 1, "betas": [0.9, 0.999], "lr": 0.001},
    }
    assert config_hash(config) == config_hash(same)
    assert config_hash(json.loads(json.dumps(to_json(config)))) == config_hash(config)
    for other in ({"seed": 1}, {"data": {"seed": 2}}, {"optim": {**config["optim"], "lr": 2e-3}}):
        assert config_hash({**config, **other}) != config_hash(config)
    assert config_hash({**config, "seed": 1}, without=["seed"]) == config_hash(
        config, without=["seed"]
    )
    assert config_hash({"lr": True}) != config_hash({"lr": 1})
    deep = {**config, "optim": {**config["optim"], "lr": 2e-3}}
    assert (
        config_hash(deep, without=["optim.lr"])
        == config_hash(config, without=["optim.lr"])
        != config_hash(config)
    )
    assert config_hash(config, without=["lr", "data.lr", "opt"]) == config_hash(config)


def test_the_hash_of_a_config_does_not_change():
    """Folders of recorded runs are named after the hash; another hash loses them."""
    config = {
        "seed": 3,
        "optim": {"lr": 1e-3, "clip": 1.0},
        "data": {"root": "/a"},
        "trainer": {"progress": True},
    }
    config |= {
        "output": {"root": "runs"},
        "resume": "auto",
        "tracker": {"wandb": "off"},
        "tuning_runs": 2,
    }
    assert config_hash(config)[:8] == "ec307d7f"


def test_where_a_run_lives():
    names = {"task": "listops", "model": "stu", "protocol": "s4", "experiment": None}
    path = run_path("runs", {"seed": 3}, names)
    assert path == Path("runs/listops/stu") / f"s4-s3-{config_hash({'seed': 3})[:8]}"


def test_renamed_keys_keep_the_identity_of_a_run():
    """The first runs were recorded under task.budget, which is task.hparams today."""
    folders = sorted((ROOT / "tests" / "support" / "first_version").glob("*/*/*"))
    assert len(folders) == 2
    for folder in folders:
        config = read_record(folder)["config"]
        assert folder.name.endswith(config_hash(config)[:8])
        task = dict(config["task"])
        renamed = {**config, "task": {"hparams": task.pop("budget"), **task}}
        assert config_hash(renamed) == config_hash(config)
