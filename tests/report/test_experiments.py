"""The tables of `lra experiments`."""

import csv
import io
import json

import pytest
from table_records import a_record

import lra
from lra.config.compose import run_config
from lra.config.options import options
from lra.errors import ConfigError
from lra.report.experiments import experiments_table, read_experiment

NAME = "listops/lru"


@pytest.fixture(scope="module")
def config():
    return run_config(lra.compose([f"experiment={NAME}"]))


@pytest.fixture
def runs(tmp_path, config):
    """Writes records of the experiment; `changes` replace keys of a section of its config."""

    def write(*runs):
        for number, (accuracy, changes, fields) in enumerate(runs):
            sections = {name: {**config[name], **keys} for name, keys in changes.items()}
            record = a_record(accuracy, seed=number, task="listops", model="lru")
            record |= {"experiment": NAME, "config": {**config, **sections, "seed": number}}
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "record.json").write_text(json.dumps(record | fields))
        return [tmp_path]

    return write


def rows(*args):
    text = experiments_table(*args, format="csv")
    return {row[0]: row[1:] for row in csv.reader(io.StringIO(text))}


def test_matrix_has_published_scores_and_a_dash_without_a_publication():
    table = rows()
    assert table["model"] == [
        *("listops", "text", "retrieval", "image", "pathfinder", "pathx", "scifar")
    ]
    assert table["stu"] == ["61.04", "90.48", "90.40", "-", "91.70", "89.71", "83.73"]
    assert table["transformer_lra"][0] == "36.37"  # listops/transformer
    assert table["stu_alternative"][0] == "none"


def test_median_of_the_finished_runs_of_an_experiment(runs):
    records = runs(
        (0.5, {}, {}),
        (0.6, {}, {}),
        (0.7, {"trainer": {"remat": "block"}}, {}),
        (0.9, {"optim": {"lr": 0.5}}, {}),  # another configuration
        (0.9, {}, {"status": "preempted"}),
        (0.9, {}, {"experiment": "listops/stu"}),
        (0.65, {"task": {"source": "release"}}, {}),
    )
    ours = "60.00 (3, generated), 65.00 (1, release)"
    assert rows(["listops"], records)[NAME][:2] == ["60.2", ours]
    assert rows((), records)["lru"][0] == f"60.2 / {ours}"


def test_list_of_a_task_has_every_file_with_its_cost():
    table = rows(["listops"])
    names = [name for name in options("experiment") if read_experiment(name).task == "listops"]
    assert list(table) == ["experiment", *names]
    assert table[NAME] == ["60.2", "-", table[NAME][2], table[NAME][3]]
    assert float(table[NAME][2]) > 1e15
    text = experiments_table(["listops"], format="markdown")
    assert "| listops/lru " in text
    assert "median of finished runs" in text


def test_unknown_task_is_one_line():
    with pytest.raises(ConfigError, match="no experiment has task listop; expected: image, "):
        experiments_table(["listop"])


def test_command_prints_the_matrix(lra_main):
    assert "61.04" in lra_main("experiments")
    assert "listops/lru" in lra_main("experiments", "listops", "--format", "csv")
