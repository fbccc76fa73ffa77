"""Paired tests against SciPy and loops, ranks against a hand-made example, and the command."""

import itertools
from math import comb

import numpy as np
import pytest
from table_records import a_record

from lra.cli import main
from lra.errors import ConfigError, LraError
from lra.report import compare as module
from lra.report.compare import compare, holm, mcnemar, mean_ranks, probability_of_improvement
from lra.runs.run_folder import RunFolder

LABELS = np.arange(400) % 3


def write_run(folder, accuracy, seed=0, labels=LABELS, rows=None, **changes):
    """A finished run that has a random share of the labels right."""
    rng = np.random.default_rng([seed, int(1e4 * accuracy)])
    right = rng.random(labels.shape) < accuracy
    logits = np.eye(3)[np.where(right, labels, (labels + 1) % 3)]
    with RunFolder(folder) as run:
        run.write_predictions(logits, labels, np.arange(len(labels)) if rows is None else rows)
        run.write_record(a_record(float(right.mean()), seed, **changes))
    return right


def test_one_pair_of_runs_is_tested_exactly():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 60, 1)) < [[[0.8]], [[0.6]]]
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(max(only_a, only_b), n + 1)) / 2**n
    assert mcnemar([(a, b)]) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar([(a, a)]) == 1.0


def test_seeds_are_clusters_of_an_example():
    """Equal seeds are no new evidence, and the size of the test is 5 %."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 500, 1)) < [[[0.75]], [[0.7]]]
    single = (((a & ~b).sum() - (b & ~a).sum()) ** 2) / ((a & ~b).sum() + (b & ~a).sum())
    from scipy.stats import chi2

    for copies in (2, 5):
        assert mcnemar([(a, b)] * copies) == pytest.approx(chi2.sf(single, 1))
    found = []
    for _ in range(400):
        hard = rng.random((300, 1))  # seeds share the difficulty of an example
        right = [rng.random((300, 1)) < hard for _ in range(6)]
        found.append(mcnemar(list(zip(right[:3], right[3:], strict=True))) < 0.05)
    assert 0.02 < np.mean(found) < 0.085


def test_probability_of_improvement_is_that_of_rliable():
    assert probability_of_improvement([0.6, 0.7], [0.5, 0.6, 0.8]) == pytest.approx(3.5 / 6)
    assert probability_of_improvement([0.6], [0.6]) == 0.5


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_ranks_and_critical_difference_are_those_of_demsar():
    """Table 5 of Demsar 2006: q = 2.569 for four models, so CD = 1.25 over 14 data sets."""
    scores = {name: [90.0 - i] * 14 for i, name in enumerate("abcd")}
    ranks = mean_ranks(scores)
    assert ranks.means == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert ranks.critical_difference == pytest.approx(1.25, abs=0.005)
    assert ranks.groups == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert ranks.p < 1e-6
    ties = mean_ranks({"a": [1.0, 2.0], "b": [1.0, 1.0], "c": [0.0, 0.0]})
    assert ties.means == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert ties.groups == [["a", "b", "c"]]


def test_two_folders_are_compared_seed_by_seed(tmp_path, capsys):
    runs = {}
    for (name, accuracy), seed in itertools.product((("stu", 0.6), ("lru", 0.8)), range(3)):
        runs[name, seed] = write_run(tmp_path / name / f"s{seed}", accuracy, seed, model=name)
    assert main(["compare", str(tmp_path / "lru"), str(tmp_path / "stu")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["listops_short,", "400", "test", "examples"]
    rows = {tuple(line[2:4]): line[4:] for line in lines if line[:2] == ["lru", "stu"]}
    assert list(rows) == [("seed", "0"), ("seed", "1"), ("seed", "2"), ("3", "seeds")]
    for seed in range(3):
        lru, stu = runs["lru", seed], runs["stu", seed]
        expected = [f"{100 * lru.mean():.2f}", f"{100 * stu.mean():.2f}"]
        assert rows["seed", str(seed)][:2] == expected
        only = [str((lru & ~stu).sum()), str((stu & ~lru).sum())]
        assert rows["seed", str(seed)][3:5] == only
    assert rows["3", "seeds"][-1] == "1.00"
    assert float(rows["3", "seeds"][-2]) < 1e-6


def test_other_seeds_are_paired_in_their_order():
    assert module.seed_pairs({3: 0, 1: 0}, {1: 0, 2: 0}) == [(1, 1)]
    assert module.seed_pairs({3: 0, 1: 0}, {9: 0, 7: 0, 8: 0}) == [(1, 7), (3, 8)]


def test_names_of_others_are_neither_escapes_nor_formulas(tmp_path, capsys):
    names = ["\x1b]0;x\x07", "a $x_{$ b", "_c"]
    for number, name in enumerate(names):
        for task in ("image", "listops"):
            write_run(tmp_path / f"{task}{number}", 0.5 + number / 10, model=name, task=task)
    assert main(["compare", str(tmp_path), "--plot", str(tmp_path / "ranks.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert any(r"\x1b]0;x\x07" in line for line in lines)
    assert (tmp_path / "ranks.svg").exists()


def test_several_models_on_several_tasks_are_ranked(tmp_path, capsys):
    accuracies = {"stu": 0.6, "lru": 0.8, "gru": 0.4}
    for (name, accuracy), task in itertools.product(accuracies.items(), ("image", "text", "copy")):
        write_run(tmp_path / task / name, accuracy, model=name, task=task)
    plot = tmp_path / "ranks.png"
    assert main(["compare", str(tmp_path), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert out.count("400 test examples") == 3
    assert out.count("p (Holm)") == 3
    assert "Mean ranks over 3 tasks, 1 is best: Friedman p = 0.050, critical difference 1.91" in out
    ranked = [line.split() for line in out.splitlines() if line.endswith("|")]
    assert [line[:2] for line in ranked[:2]] == [["1.00", "lru"], ["2.00", "stu"]]
    assert plot.read_bytes().startswith(b"\x89PNG")
    two = compare([tmp_path], models=["stu", "lru"])
    assert "Over 3 tasks, lru and stu: Wilcoxon signed-rank p = 0.250" in two
    with pytest.raises(ConfigError, match=r"--plot .* need 3 models with 2 common tasks"):
        compare([tmp_path], models=["stu", "lru"], plot=plot)


def test_labels_of_one_example_are_clustered(tmp_path):
    labels = np.stack([LABELS, LABELS[::-1]], axis=1)
    for name, accuracy in (("stu", 0.6), ("lru", 0.8)):
        write_run(tmp_path / name, accuracy, labels=labels, model=name)
    assert "400 test examples" in compare([tmp_path])


def test_runs_that_cannot_be_paired_are_refused(tmp_path):
    for name in ("stu", "lru"):
        write_run(tmp_path / "same" / name, 0.6, model=name)
    write_run(tmp_path / "labels", 0.6, model="gru", labels=LABELS[::-1])
    write_run(tmp_path / "rows", 0.6, model="gru", rows=np.arange(400) + 1)
    data = {"source": "generated", "key": "1", "splits": {"test": {"sha256": "2"}}}
    write_run(tmp_path / "hash", 0.6, model="gru", data=data)
    first, second = tmp_path / "same" / "stu", tmp_path / "same" / "lru"
    for other in ("labels", "rows", "hash"):
        with pytest.raises(LraError, match="have different test data of listops_short") as caught:
            compare([first, tmp_path / other])
        assert "\n" not in str(caught.value)
    for paths, words in (
        ([first], "holds only stu"),
        ([first, first], "is compared with itself"),
        ([tmp_path / "same", first], "holds lru, stu; with two folders each must hold one"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(paths)
    with pytest.raises(ConfigError, match="no finished run there"):
        compare([first, second], tasks=["text"])
    write_run(tmp_path / "text", 0.6, model="gru", task="text")
    with pytest.raises(ConfigError, match="no task in common"):
        compare([first, tmp_path / "text"])
    (second / "predictions.npz").unlink()
    with pytest.raises(LraError, match=r"has no predictions\.npz"):
        compare([first, second])


def test_folders_on_the_command_line_are_checked(tmp_path, caplog):
    assert main(["compare", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert "no such folder" in caplog.text
    assert main(["compare", *[str(tmp_path)] * 3]) == 2
    assert "takes one or two" in caplog.text
