"""`lra reproduce`: list, records, replaced folders, unknown names; training against a loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from lra.cli import main
from lra.studies import lds_training, learning
from lra.studies.lds import PRINTED
from lra.studies.reproduce import STUDIES
from models.lds_layers import stu_taps


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All studies at their quick sizes."""
    root = tmp_path_factory.mktemp("reproduce")
    assert main(["reproduce", "all", "--quick", "--output", str(root)]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_each_study_has_a_figure_data_and_a_record(name, results):
    folder = results / name
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "record.json").read_text())
    assert record["quick"]
    assert record["command"] == f"lra reproduce {name} --quick"
    assert record["numbers"]
    assert {"commit", "versions", "device", "started", "wall_s", "cpu_s"} <= record.keys()
    tables = list(folder.glob("*.csv"))
    assert tables
    assert all(len(pd.read_csv(table)) for table in tables)


def test_rerun_replaces_the_folder_as_a_whole(tmp_path, capsys):
    words = ["reproduce", "fig1", "--quick", "--output", str(tmp_path)]
    assert main([*words, "--format", "svg"]) == 0
    (tmp_path / "fig1" / "of_an_older_version.csv").write_text("x\n1\n")
    assert main(words) == 0
    files = {file.name for file in (tmp_path / "fig1").iterdir()}
    assert files == {"fig1.png", "fig1.csv", "record.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["fig1"]
    assert main(["reproduce", "--output", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()[-len(STUDIES) :]
    states = {line.split()[0]: line.rpartition(": ")[2] for line in listed}
    assert states["fig1"] == "results of an older version or of other settings"
    assert states["gap"] == "not done"


def test_list_shows_finished_studies(tmp_path, capsys):
    (tmp_path / "fig1").mkdir()
    study = STUDIES["fig1"]
    record = {"settings_hash": study.settings_hash(study.full), "commit": "abc1234"}
    (tmp_path / "fig1" / "record.json").write_text(json.dumps(record))
    assert main(["reproduce", "--output", str(tmp_path)]) == 0
    assert "done, commit abc1234" in capsys.readouterr().out.splitlines()[0]


def test_a_folder_of_something_else_is_kept(tmp_path, caplog):
    (tmp_path / "fig1").mkdir()
    (tmp_path / "fig1" / "thesis.tex").write_text("x")
    assert main(["reproduce", "fig1", "--quick", "--output", str(tmp_path)]) == 1
    assert "no record.json" in caplog.text
    assert (tmp_path / "fig1" / "thesis.tex").exists()


def test_unknown_name_lists_the_known_ones(caplog):
    assert main(["reproduce", "fig2"]) == 2
    (line,) = caplog.text.splitlines()
    assert "no study fig2" in line
    assert all(name in line for name in STUDIES)


def test_sequence_has_the_outputs_of_the_system():
    u, y = lds_training.sequence(jax.random.key(0), 20)
    np.testing.assert_allclose(y, PRINTED.outputs(np.asarray(u)), atol=1e-4)


@pytest.mark.slow
def test_stu_training_is_adam_on_the_summed_squared_error():
    """One setting in NumPy, with the gradient of least squares written out."""
    length, steps, k = 20, 4, 2
    runs = lds_training.train_stu(length, steps, 1, (1, k), k)
    taps = stu_taps(length, k)
    wanted = {"feedback": "none", "filters": k, "rate": 0.5}
    m, optimizer = np.zeros((taps.shape[1] * 3, 3)), optax.adam(0.5)
    state, losses = optimizer.init(jnp.asarray(m)), []
    for key in jax.random.split(jax.random.key(0), steps):
        u, y = (np.asarray(x, np.float64) for x in lds_training.sequence(key, length))
        x = np.zeros((length, taps.shape[1], 3))
        for t in range(length):
            x[t] = sum(taps[i][:, None] * u[t - i] for i in range(t + 1))
        x = x.reshape(length, -1)
        losses.append(np.sum((x @ m - y) ** 2))
        update, state = optimizer.update(jnp.asarray(2 * x.T @ (x @ m - y), jnp.float32), state)
        m = m + np.asarray(update, np.float64)
    found = runs.curves[0, runs.rows.index(wanted)]
    np.testing.assert_allclose(found, losses, rtol=1e-3)


def test_samples_to_a_low_loss_are_those_of_the_middle_seed():
    curves = np.full((3, 40), 5e3)
    curves[0, 10:], curves[1, 20:] = 1.0, 1.0
    assert learning.samples_to(curves, 1e3, 10) == 30
    curves[1] = np.nan
    assert learning.samples_to(curves, 1e3, 10) is None
