"""From Python: a trained model on one's own inputs, records and tables."""

import jax.numpy as jnp
import numpy as np
import pytest

import lra
from lra.errors import LraError, RunFolderError
from lra.report.saved_run import SavedRun
from lra.runs.records import read_predictions, read_record


def test_loaded_model_gives_the_logits_of_the_run(trained_run, data_root):
    model, task = lra.load_run(trained_run)
    words = ["task.sizes={train: 64, val: 24, test: 21}", "task.max_length=30"]
    words += ["debug=tiny", f"data.root={data_root}"]
    test = lra.load("listops_short", overrides=words)["test"]
    texts = [task.to_text(row[:n]) for row, n in zip(test.inputs[:5], test.lengths, strict=False)]
    inputs, lengths = task.encode(*texts)
    stored = read_predictions(trained_run)
    np.testing.assert_array_equal(stored["rows"][:5], np.arange(5))
    np.testing.assert_allclose(model(inputs, lengths), stored["logits"][:5], atol=1e-5)
    np.testing.assert_array_equal(task.decode(jnp.asarray(test.inputs[:5])), inputs)
    np.testing.assert_array_equal(lengths, test.lengths[:5])
    *_, last = model.layers(inputs, lengths)
    assert last.shape == (5, task.seq_len, read_record(trained_run)["config"]["backbone"]["width"])


def test_weights_of_a_loaded_run_can_be_chosen(trained_run):
    with pytest.raises(RunFolderError, match="holds no run"):
        lra.load_run(trained_run / "checkpoints")
    model, task = lra.load_run(str(trained_run), weights="last")
    assert model(*task.encode("[MAX 2 9 [MIN 4 7 ] 0 ]")).shape == (1, 10)


def test_records_are_a_data_frame_with_a_row_for_each_run(trained_run):
    frame, record = lra.records(trained_run), read_record(trained_run)
    assert len(frame) == 1
    row = frame.iloc[0]
    assert row["path"] == str(trained_run)
    assert row["model"] == "stu"
    assert row["config.optim.lr"] == record["config"]["optim"]["lr"]
    assert row["metrics.test.accuracy"] == record["metrics"]["test"]["accuracy"]
    assert lra.records([trained_run, trained_run.parent]).equals(frame)  # each run once
    assert len(lra.records([])) == 0


def test_table_is_markdown_that_a_notebook_renders(trained_run):
    table = lra.table(trained_run, published="none")
    assert table.startswith("| model")
    assert "\n| stu " in table
    assert table._repr_markdown_() == str(table)
    assert "61.04" not in table
    assert "61.04" in lra.table([trained_run], tasks=["listops_short"])
    with pytest.raises(LraError, match="published"):
        lra.table(trained_run, published="some")


@pytest.mark.parametrize("data", [None, {}, {"splits": {}}])
def test_a_record_without_data_is_refused_in_one_line(trained_run, data):
    run = SavedRun(trained_run)
    run.record = {**run.record, "data": data}
    with pytest.raises(RunFolderError, match=r"has no data\.splits; run it again"):
        _ = run.eval_batch
