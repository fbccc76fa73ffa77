"""Diagnostics of a run against slow, obvious references: a recursive parser, loops over examples, the stored predictions."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from doc_commands import blocks, run, shortened
from scipy.stats import binomtest
from tiny import TINY

import lra
from lra import cli
from lra.config.build import build_task, data_arguments
from lra.config.compose import compose
from lra.data.store import Split, prepare
from lra.errors import ConfigError, DataError, LraError, RunFolderError
from lra.report import perturbations
from lra.report.diagnose import (
    DIAGNOSTICS,
    FILE,
    Diagnosed,
    check_weights,
    diagnose,
    longer,
    save,
    settings,
    shortest,
)
from lra.report.plots import draw_tables
from lra.runs import records
from lra.runs.records import read_record
from lra.runs.run_folder import RunFolder
from lra.tasks.listops import ListOps
from lra.tasks.listops_generator import TOKENS
from lra.training.trainer import describe_data, first_record, run_config
from models.ops.filters import spectral_filters

SMALL = ["model=stu", "model.num_filters=8", "trainer.steps=8", "trainer.eval_every=4"]


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """The folder of a finished run of the STU on short rows."""
    root = tmp_path_factory.mktemp("diagnosed")
    lra.train([*TINY, *SMALL, f"data.root={data_root}", f"output.root={root}"])
    (record,) = root.rglob("record.json")
    return record.parent


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def tables_of(folder, *words, **options):
    return {name: tables for name, tables, _ in diagnose(folder, words, **options)}


def untrained(overrides, folder):
    """As a run that has only begun, with weights that are random, also where a model starts with zeros."""
    cfg = compose(overrides)
    run = Diagnosed(folder, {"status": "running"}, cfg, "test", None, None, None)
    leaves, form = jax.tree.flatten(run.setup.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    run.saved = ((jax.tree.unflatten(form, moved), run.setup.batch_stats), 0)
    return run


@pytest.fixture(scope="module")
def stu(tmp_path_factory):
    return untrained([*TINY, *SMALL, "backbone.depth=1"], tmp_path_factory.mktemp("stu"))


# ---- what examples differ in


def parsed(words):
    """(depth, rest) of the expression that begins the words."""
    head, *rest = words
    if not head.startswith("["):
        return 1, rest
    deepest = 0
    while rest[0] != "]":
        depth, rest = parsed(rest)
        deepest = max(deepest, depth)
    return 1 + deepest, rest[1:]


@pytest.mark.parametrize("inputs", ["lra2020", "s4"])
def test_depth_and_root_operator_are_those_of_a_recursive_parser(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("lra.tasks.listops.ROWS_PER_COUNT", 7)
    task = ListOps(
        {"inputs": inputs},
        tmp_path,
        "l",
        "generated",
        6,
        5,
        4,
        60,
        {"train": 1, "val": 1, "test": 60},
        0,
    )
    split = prepare(task, tmp_path).splits["test"]
    found = task.factors(split)
    special = len(task.vocab) - len(TOKENS)
    for i, (ids, length) in enumerate(zip(split.inputs, split.lengths, strict=True)):
        words = [task.vocab[k] for k in ids[:length] if k >= special]
        depth, rest = parsed(words)
        assert rest == []
        assert (found["depth"][i], f"[{found['root operator'][i]}") == (depth, words[0])
    assert set(found["depth"].tolist()) >= {2, 3, 4, 5}
    assert set(found["root operator"].tolist()) == {"MAX", "MED", "MIN", "SM"}
    np.testing.assert_array_equal(found["length"], split.lengths)
    np.testing.assert_array_equal(found["label"], split.labels)


@pytest.mark.parametrize("name", ["induction_heads", "associative_recall"])
def test_distance_is_that_to_what_is_asked_for(name, tmp_path):
    task = build_task(compose([f"task={name}", "task.sizes={train: 1, val: 1, test: 30}"]))
    split = prepare(task, tmp_path).splits["test"]
    for ids, label, distance in zip(
        split.inputs, split.labels, task.factors(split)["distance"], strict=True
    ):
        place = len(ids) - 1 - distance
        assert ids[place] == ids[-1]
        assert ids[place + 1] == task.first_label + label
        assert (ids[:place] != ids[-1]).all()


def test_pictures_differ_in_brightness_and_pairs_in_two_lengths():
    picture = build_task(compose(["task=pathfinder"]))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1024), np.uint8)
    split = Split(pixels, np.full(5, 1024), np.arange(5) % 2)
    found = picture.factors(split)
    assert sorted(found) == ["brightness", "label"]  # all are of one length
    assert found["brightness"].tolist() == [round(float(row.mean())) for row in pixels]
    colour = build_task(compose(["task=scifar"]))
    found = colour.factors(
        Split(pixels.reshape(-1)[: 3 * 1024].reshape(1, 1024, 3), np.array([1024]), np.array([0]))
    )
    assert found["brightness"].tolist() == [round(float(pixels.reshape(-1)[: 3 * 1024].mean()))]
    pair = build_task(compose(["task=retrieval"]))
    found = pair.factors(
        Split(np.ones((2, 2, 4000), np.uint8), np.array([[7, 9], [8, 5]]), np.array([0, 1]))
    )
    assert found["length of the first"].tolist() == [7, 8]
    assert found["length of the second"].tolist() == [9, 5]


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (480, 2000)])
def test_interval_is_that_of_scipy(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert perturbations.wilson(right / count, count) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_rows_of_a_factor_are_its_subsets():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 400).astype(float)
    few, names = (
        rng.integers(0, 5, 400),
        rng.choice(np.array([f"name {i}" for i in range(30)]), 400),
    )
    for values in (few, names):
        for line in perturbations.by_factor(values, right):
            subset = [r for r, value in zip(right, values, strict=True) if str(value) == line.value]
            assert (line.accuracy, line.examples) == (pytest.approx(np.mean(subset)), len(subset))
    many = np.minimum(rng.integers(0, 500, 400), 250)  # half of them are 250
    rows = perturbations.by_factor(many, right)
    assert sum(line.examples for line in rows) == 400
    assert 2 < len(rows) <= perturbations.BINS
    for line in rows:
        low, _, high = line.value.partition(" to ")
        subset = right[(many >= int(low)) & (many <= int(high or low))]
        assert (line.accuracy, line.examples) == (pytest.approx(subset.mean()), len(subset))
    assert [line.examples for line in perturbations.by_factor(rng.permutation(400), right)] == [
        50
    ] * 8
    assert list(perturbations.by_factors({"few": few, "one": np.zeros(400, int)}, right)) == ["few"]


def test_factors_are_counted_from_the_stored_predictions_alone(copied):
    shutil.rmtree(copied / "checkpoints")
    found = tables_of(copied)["factors"]
    record, stored = read_record(copied), records.read_predictions(copied)
    (line,) = found["all"]
    assert (line.accuracy, line.examples) == (
        pytest.approx(record["metrics"]["test"]["accuracy"]),
        21,
    )
    assert set(found) == {"all", "label", "length", "depth", "root operator"}
    right = stored["logits"].argmax(axis=1) == stored["labels"]
    assert {line.value: line.accuracy for line in found["label"]} == pytest.approx(
        {
            str(label): right[stored["labels"] == label].mean()
            for label in set(stored["labels"].tolist())
        }
    )
    written = json.loads((copied / FILE).read_text())["factors"]["test"]
    assert (written["source"], written["step"]) == ("predictions.npz", record["selection"]["step"])
    assert tables_of(copied, examples=5)["factors"]["all"][0].accuracy == pytest.approx(
        right[:5].mean()
    )
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        tables_of(copied, "permutation")
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        tables_of(copied, split="val", examples=5)
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        tables_of(copied, weights="last")
    record["data"]["splits"]["test"]["sha256"] = "0"
    (copied / "record.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="holds other examples"):
        tables_of(copied)


def test_places_of_several_labels_have_a_row_each(data_root, tmp_path):
    """From a record and predictions that no model has made."""
    sizes = "task.sizes={train: 4, val: 2, test: 40}"
    cfg = compose(["task=copy", "task.copy_len=3", sizes, "debug=tiny", f"data.root={data_root}"])
    store = prepare(task := build_task(cfg), **data_arguments(cfg))
    labels = np.asarray(store.splits["test"].labels)
    guesses = labels.copy()
    guesses[:10, 1] = (guesses[:10, 1] + 1) % task.num_classes
    record = first_record(cfg, {}, []) | {
        "status": "finished",
        "data": describe_data(store),
        "selection": {"step": 4},
    }
    with RunFolder(tmp_path) as folder:
        folder.write_record(record)
        folder.write_predictions(np.eye(task.num_classes)[guesses], labels, np.arange(40))
    found = tables_of(tmp_path)["factors"]
    assert [line.accuracy for line in found["place of the label"]] == [1, 0.75, 1]
    assert found["all"][0].accuracy == pytest.approx(1 - 0.25 / 3)
    with pytest.raises(ConfigError, match="locality: copy asks for 3 labels"):
        tables_of(tmp_path, "locality")


# ---- without order


def shuffled_by_loop(rows, lengths, size, seed=0):
    blocks = -(-rows.shape[1] // size)
    words = (
        np.random.Philox(key=np.array([seed, size], np.uint64))
        .random_raw(len(rows) * blocks)
        .reshape(-1, blocks)
    )
    out = rows.copy()
    for row, length, order in zip(out, lengths, words, strict=True):
        parts = [row[i : i + size].copy() for i in range(0, length - length % size, size)]
        parts += [row[length - length % size : length].copy()] if length % size else []
        row[:length] = np.concatenate(
            [parts[i] for i in sorted(range(len(parts)), key=lambda i: order[i])] or [row[:0]]
        )
    return out


@pytest.mark.parametrize("size", [1, 3, 4, 8, 19, 20])
def test_blocks_are_shuffled_as_a_loop_does_it(size, monkeypatch):
    monkeypatch.setattr(perturbations, "ELEMENTS_AT_ONCE", 45)  # two rows
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(0, 1000, (9, 20, 2)), np.array([20, 19, 1, 0, 7, 8, 12, 20, 16])
    moved = perturbations.shuffle_blocks(rows, lengths, size)
    np.testing.assert_array_equal(moved, shuffled_by_loop(rows, lengths, size))
    padding = np.arange(20) >= lengths[:, None]
    np.testing.assert_array_equal(moved[padding], rows[padding])
    np.testing.assert_array_equal(np.sort(moved[..., 0]), np.sort(rows[..., 0]))
    assert np.array_equal(moved, rows) == (size == 20)
    np.testing.assert_array_equal(
        perturbations.shuffle_blocks(rows[:4], lengths[:4], size), moved[:4]
    )
    pairs = perturbations.shuffle_blocks(
        rows[:8].reshape(4, 2, 20, 2), lengths[:8].reshape(4, 2), size
    )
    np.testing.assert_array_equal(pairs.reshape(8, 20, 2), moved[:8])


def test_every_order_is_as_likely():
    rows = np.tile(np.arange(3), (6000, 1))
    moved = perturbations.shuffle_blocks(rows, np.full(6000, 3), 1)
    _, counts = np.unique(moved, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 150  # five standard deviations


def test_whole_blocks_and_windows_are_the_recorded_score(trained):
    found = tables_of(trained, "permutation", "locality", sizes=[32, 8])
    record = read_record(trained)
    assert [line.value for line in found["permutation"]["block size"]] == ["8", "32"]
    for tables in (found["permutation"]["block size"], found["locality"]["window size"]):
        assert tables[-1].accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])
        assert {line.examples for line in tables} == {21}


def test_scales_end_at_the_length_of_the_task():
    assert perturbations.scales(16, 2048) == [16, 64, 256, 1024, 2048]
    assert perturbations.scales(1, 16) == [1, 4, 16]
    assert perturbations.scales(8, 8) == [8]


# ---- without distance


def test_windows_are_cut_as_a_loop_does_it():
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(1, 1000, (5, 10, 3)), np.array([10, 9, 4, 0, 5])
    found = perturbations.cut_windows(rows, lengths, 4, 6)
    expected = []
    for owner, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        starts = range(0, max(length, 1), 4)
        expected += [(owner, row[start : min(start + 4, length)]) for start in starts]
    assert found.owners.tolist() == [owner for owner, _ in expected]
    for inputs, length, (_, window) in zip(found.inputs, found.lengths, expected, strict=True):
        assert inputs.shape == (6, 3)
        np.testing.assert_array_equal(inputs[:length], window)
    assert (found.inputs[:, 4:] == 0).all()
    logits = rng.normal(size=(len(expected), 2))
    means = [
        np.mean([logit for logit, (o, _) in zip(logits, expected, strict=True) if o == i], axis=0)
        for i in range(5)
    ]
    np.testing.assert_allclose(perturbations.mean_by_owner(logits, found.owners, 5), means)


def windows_agree(run, size, made_for):
    """Whether logits of windows are those of windows padded to the length that the run's own model reads."""
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(3, 18, (3, 32)), np.array([32, 30, 9])
    setup, padded = shortest(run, size)
    assert padded == made_for
    short, long = (perturbations.cut_windows(rows, lengths, size, width) for width in (padded, 32))
    expected = run.logits(long.inputs, long.lengths)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(run.logits(short.inputs, short.lengths, setup), expected, atol=2e-5)


def test_model_of_short_windows_is_the_trained_one(stu):
    windows_agree(stu, 4, 8)  # eight filters ask for as many positions


def test_model_whose_parameters_depend_on_the_length_keeps_it(tmp_path):
    run = untrained([*TINY, "model=mega", "model.chunk_size=null", "backbone.depth=1"], tmp_path)
    windows_agree(run, 8, 32)
    with pytest.raises(
        ConfigError, match=r"rel_bias is \(63,\) at 32 positions and \(191,\) at 96;"
    ) as caught:
        check_weights(run, ["task.seq_len=96"], longer(run, ["task.seq_len=96"]))
    assert "\n" not in str(caught.value)


# ---- other lengths


def test_keys_are_taken_together():
    assert settings(["task.a=1,2", "task.b=3,4", "task.sizes={train: 1, val: 2}"]) == [
        ["task.a=1", "task.b=3", "task.sizes={train: 1, val: 2}"],
        ["task.a=2", "task.b=4", "task.sizes={train: 1, val: 2}"],
    ]
    with pytest.raises(ConfigError, match=r"task.b=1,2 has 2 values and another key 3"):
        settings(["task.a=1,2,3", "task.b=1,2"])
    with pytest.raises(ConfigError, match="say which task.KEY=VALUE"):
        settings([])


def test_longer_rows_are_scored_beside_those_of_training(trained):
    words = [
        "length",
        "task.min_length=31,45",
        "task.max_length=44,60",
        "task.sizes={train: 1, val: 3, test: 9}",
    ]
    found = tables_of(trained, *words)["length"]["task"]
    record = read_record(trained)
    assert found[0].accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert [line.examples for line in found] == [21, 9, 9]
    assert found[2].value.startswith("task.min_length=45 task.max_length=60 (")
    written = json.loads((trained / FILE).read_text())["length"]["test"]
    assert written["keys"] == words[1:]
    assert [line["value"] for line in written["tables"]["task"]] == [line.value for line in found]


def test_padding_alone_changes_no_logit_of_a_model_without_a_length(data_root, tmp_path):
    run = untrained([*TINY, "model=gru", "backbone.depth=1", f"data.root={data_root}"], tmp_path)
    split = prepare(run.task, data_root).splits["test"]
    inputs, lengths = np.asarray(split.inputs), np.asarray(split.lengths)
    setup = longer(run, ["task.seq_len=48"])
    check_weights(run, ["task.seq_len=48"], setup)
    found = run.logits(np.pad(inputs, ((0, 0), (0, 16))), lengths, setup)
    np.testing.assert_allclose(found, run.logits(inputs, lengths), atol=1e-5)


def test_filters_are_made_anew_for_another_length(stu):
    setup = longer(stu, ["task.seq_len=48"])
    check_weights(stu, [], setup)
    _, phi = spectral_filters(48, 8)
    (found, *_) = (leaf for leaf in jax.tree.leaves(setup.constants) if leaf.shape == (48, 8))
    np.testing.assert_allclose(found, phi, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lenght"], "unknown diagnostic lenght .did you mean length"),
        (
            ["factors", "task.max_length=40"],
            "length alone looks at; write: length task.max_length=40",
        ),
        (
            ["length", "task.max_lenght=40"],
            "task=listops_short has no max_lenght to set .did you mean max_length",
        ),
        (["length", "task._target_=lra.tasks.synthetic.Copy"], "has no _target_ to set"),
        (["length", "task.max_length=10"], "min_length=21, max_length=10"),
        (["length", "task.sizes.test=0", "task.max_length=40"], "task.sizes.test=0 must be"),
        (["length"], "say which task.KEY=VALUE"),
        (["length", "optim.lr=1"], "a saved run keeps its own config"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words, message, trained):
    with pytest.raises(ConfigError, match=message) as caught:
        tables_of(trained, *words)
    assert "\n" not in str(caught.value)


def test_numbers_out_of_their_range_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="--examples 0: expected 1 or more"):
        tables_of(trained, examples=0)
    with pytest.raises(ConfigError, match=r"--sizes 33: expected numbers in \[1, 32\]"):
        tables_of(trained, "permutation", sizes=[4, 33])
    with pytest.raises(RunFolderError, match="holds no run"):
        tables_of(tmp_path / "nowhere")


def test_another_vocabulary_and_pairs_are_refused(tmp_path):
    run = untrained(["task=associative_recall", "model=gru", "debug=tiny"], tmp_path)
    with pytest.raises(
        ConfigError, match="vocab is 25 there and 17 in the run; only lengths may change"
    ):
        longer(run, ["task.num_keys=20"])
    cfg = compose(["task=retrieval", "debug=tiny"])
    with RunFolder(tmp_path) as folder:
        folder.write_record(
            first_record(cfg, {}, []) | {"config": run_config(cfg), "status": "finished"}
        )
    with pytest.raises(ConfigError, match="locality: an example of retrieval is a pair"):
        tables_of(tmp_path, "locality")


# ---- what is kept and shown


def test_results_are_added_and_none_is_lost(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: save(tmp_path, f"d{i % 8}", f"s{i // 8}", {"step": i}), range(24)))
    found = json.loads((tmp_path / FILE).read_text())
    assert found.pop("schema") == 1
    assert found == {f"d{i}": {f"s{j}": {"step": i + 8 * j} for j in range(3)} for i in range(8)}
    save(tmp_path, "d0", "s1", {"step": -1})
    assert json.loads((tmp_path / FILE).read_text())["d0"] == {
        "s0": {"step": 0},
        "s1": {"step": -1},
        "s2": {"step": 16},
    }
    for damaged, message in (("{", "is not JSON"), ("[]", "is not of schema 1")):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(RunFolderError, match=message):
            save(tmp_path, "d0", "s0", {})
        assert (tmp_path / FILE).read_text() == damaged


def test_command_takes_words_behind_options_prints_and_draws(copied, lra_command, tmp_path):
    picture = tmp_path / "found.png"
    words = [
        copied,
        "--split",
        "val",
        "--sizes",
        "4,32",
        "permutation",
        "--plot",
        picture,
        "factors",
    ]
    done = lra_command("diagnose", *words, "trainer.eval_batch_size=16")
    assert done.returncode == 0, done.stderr
    assert (
        "| block size | accuracy, % | 95 % interval | examples |\n|---|---:|---:|---:|\n| 4 | "
        in done.stdout
    )
    assert "| root operator | accuracy" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((copied / FILE).read_text())) >= {"schema", "permutation", "factors"}
    done = lra_command("diagnose", copied, "--sizes", "4,x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--sizes 4,x: expected whole numbers" in done.stderr


@pytest.mark.slow
def test_commands_of_the_page_work_one_after_the_other(data_root, tmp_path):
    (block,) = blocks("docs/diagnose.md", "bash")
    for line in block.splitlines():
        found = sorted(tmp_path.glob("mine/listops_short/lru/*"))
        words = shortened(line.replace("mine/listops_short/lru/*", str(*found)), data_root)
        done = run(words, tmp_path)
        assert done.returncode == 0, done.stderr
        assert words[0] == "train" or "| 95 % interval |" in done.stdout
    assert set(json.loads((found[0] / FILE).read_text())) == {"schema", *DIAGNOSTICS}
    assert (tmp_path / "longer.png").read_bytes().startswith(b"\x89PNG")


def test_help_lists_every_diagnostic():
    lines = [line.split()[0] for line in cli.DIAGNOSE_HELP.split("\n\n")[1].splitlines()]
    assert lines == list(DIAGNOSTICS)


def test_tables_are_drawn_or_the_type_is_refused(tmp_path):
    tables = {
        "length": [
            perturbations.row("as trained " * 9, np.ones(4)),
            perturbations.row("x", np.zeros(3)),
        ]
    }
    assert draw_tables(tables, tmp_path / "a.svg").exists()
    with pytest.raises(LraError, match="cannot draw"):
        draw_tables(tables, tmp_path / "a.doc")
