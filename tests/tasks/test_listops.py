"""ListOps: grammar, answers, encodings, the release's files, errors."""

import hashlib
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from configured_task import configured_task

from lra.data.store import prepare, store_name
from lra.errors import ConfigError, DataError, LraError
from lra.tasks import listops, listops_generator
from lra.tasks.base import SPLITS
from lra.tasks.listops import CLOSE, FIRST_OPERATOR
from lra.tasks.listops_generator import TOKENS, Grammar, Rows, draw_chunk, evaluate, generate

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FULL = Grammar(max_depth=10, min_args=2, max_args=10, min_length=501, max_length=1999)
SHORT = Grammar(max_depth=6, min_args=2, max_args=6, min_length=21, max_length=128)
SIZES = {"train": 60, "val": 20, "test": 30}


def make_task(inputs="s4", data_root="unused", config="listops_short", **changes):
    changes = {"sizes": SIZES} | changes
    return configured_task(config, {"inputs": inputs}, data_root, **changes)


def short_rows(**changes):
    return generate(SIZES, 0, SHORT._replace(**changes))


def equal(one: Rows, other: Rows) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.labels, other.labels)


# --- Answers ---


@pytest.mark.parametrize("file", ["listops_original.tsv", "listops_release_rows.tsv"])
def test_published_rows_are_answered_and_written_as_published(file):
    rows = [
        line.split("\t")
        for line in (GOLDEN / file).read_text().splitlines()
        if not line.startswith("Source")
    ]
    pairs = [
        sorted(row, key=len) for row in rows
    ]  # the two publishers order the columns differently
    assert len(pairs) in (500, 5)
    for answer, source in pairs:
        tokens = listops_generator.parse_text(source)
        assert evaluate(tokens) == int(answer), source
        assert listops.to_release_text(tokens) == source


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", 7),
        ("[MED 9 2 ]", 5),  # 5.5, truncated
        ("[MED 1 8 3 ]", 3),
        ("[SM 9 9 9 ]", 7),
        ("[MAX 1 [MIN 9 4 ] 2 ]", 4),
    ],
)
def test_answers_by_hand(text, answer):
    assert evaluate(listops_generator.parse_text(text)) == answer


@pytest.mark.parametrize("text", ["", "1 2", "[MAX 1 2", "[MAX ]", "1 ]", "[MAX 1 ] ]"])
def test_rows_that_are_no_expression_are_refused(text):
    with pytest.raises(ValueError, match="bracket"):
        evaluate(listops_generator.parse_text(text))


# --- Generator ---


def rows_by_loop(seed, chunk, grammar, draws):
    """The specification of the generator: node by node, trees as nested dictionaries."""
    bits = np.random.Philox(key=np.array([seed, chunk], np.uint64))

    def words(count):
        raw = [int(word) for word in bits.random_raw((count + 1) // 2)]
        return [half for word in raw for half in (word & 0xFFFFFFFF, word >> 32)][:count]

    def scaled(word, span):
        return (word % 2**28) * span // 2**28

    def node(word, depth):
        if depth < grammar.max_depth and word >> 30 == 0:
            args = grammar.min_args + scaled(word, grammar.max_args - grammar.min_args + 1)
            return {"token": FIRST_OPERATOR + (word >> 28), "args": args, "children": []}
        return {"token": scaled(word, 10)}

    def tokens(tree):
        if "args" not in tree:
            return [tree["token"]]
        return [
            tree["token"],
            *(token for child in tree["children"] for token in tokens(child)),
            CLOSE,
        ]

    trees = [tree for tree in (node(word, 1) for word in words(draws)) if "args" in tree]
    lengths = [1] * len(trees)
    frontier = [(i, tree) for i, tree in enumerate(trees)]
    for depth in range(2, grammar.max_depth + 1):
        for i, parent in frontier:
            lengths[i] += 1 + parent["args"]
        parents = [(i, parent) for i, parent in frontier if lengths[i] <= grammar.max_length]
        fresh = iter(words(sum(parent["args"] for _, parent in parents)))
        frontier = []
        for i, parent in parents:
            parent["children"] = [node(next(fresh), depth) for _ in range(parent["args"])]
            frontier += [(i, child) for child in parent["children"] if "args" in child]
    return [
        tokens(trees[i])
        for i in range(len(trees))
        if grammar.min_length <= lengths[i] <= grammar.max_length
    ]


@pytest.mark.parametrize(
    "grammar", [FULL, SHORT, Grammar(2, 1, 3, 1, 99), Grammar(4, 2, 16, 10, 40)]
)
def test_generator_equals_the_loop(grammar, monkeypatch):
    monkeypatch.setattr(listops_generator, "DRAWS_PER_CHUNK", 501)
    rows = draw_chunk(7, 3, grammar)
    expected = rows_by_loop(7, 3, grammar, 501)
    assert len(rows) == len(expected) > 0
    assert [rows[i].tolist() for i in range(len(rows))] == expected


def test_labels_equal_the_stack_machine():
    for rows in (draw_chunk(0, 0, FULL).take(0, 300), draw_chunk(0, 0, SHORT)):
        assert [evaluate(rows[i]) for i in range(len(rows))] == rows.labels.tolist()


def depth_of(tokens):
    return 1 + np.max(np.cumsum((tokens >= FIRST_OPERATOR) * np.where(tokens == CLOSE, -1, 1)))


def test_rows_keep_to_the_limits():
    rows = listops_generator.join([draw_chunk(1, chunk, SHORT) for chunk in range(4)])
    lengths, depths = np.diff(rows.offsets), [depth_of(rows[i]) for i in range(len(rows))]
    assert (lengths.min(), lengths.max(), max(depths)) == (21, 128, 6)


def test_statistics_are_those_of_the_release_grammar():
    """Upstream (191,611 rows): 8.25 % accepted, mean length 1036, median 954, p95 1799.

    Majority 16.9 %, root operator 36.2 %.

    Tolerances are four standard errors of this sample of 196,608 draws, about 16,200 rows.
    """
    rows = listops_generator.join([draw_chunk(11, chunk, FULL) for chunk in range(24)])
    lengths = np.diff(rows.offsets)
    assert len(rows) / (24 * listops_generator.DRAWS_PER_CHUNK) == pytest.approx(0.0825, abs=0.0025)
    assert lengths.mean() == pytest.approx(1036, abs=13)
    assert np.median(lengths) == pytest.approx(954, abs=20)
    assert np.percentile(lengths, 95) == pytest.approx(1799, abs=20)
    shares = np.bincount(rows.labels) / len(rows)
    assert shares[[0, 9]] == pytest.approx(0.17, abs=0.012)
    assert 0.06 < shares[1:9].min() < shares[1:9].max() < 0.10
    split = SimpleNamespace(
        inputs=rows.tokens[rows.offsets[:-1], None] + np.uint8(3), labels=rows.labels
    )
    lines = make_task().reference_lines({"train": split, "test": split})
    assert lines["majority"] == pytest.approx(0.169, abs=0.012)
    assert lines["root_operator"] == pytest.approx(0.362, abs=0.015)


def test_rows_are_the_same_on_every_machine():
    """Golden: if it changes, every generated store changes; increase `reader_version` too."""
    rows = short_rows()["train"]
    digest = hashlib.sha256(rows.tokens.tobytes() + rows.labels.tobytes()).hexdigest()
    assert digest[:16] == "c9d4312dfc7d3f8a"
    assert rows[0][:12].tolist() == [10, 12, 2, 11, 2, 1, 12, 5, 0, 1, 14, 6]


def test_seeds_differ_and_splits_are_disjoint():
    assert not equal(generate(SIZES, 1, SHORT)["train"], short_rows()["train"])
    small = Grammar(3, 2, 3, 4, 8)  # many duplicates are drawn
    splits = generate({"train": 700, "val": 200, "test": 200}, 0, small)
    seen = [rows[i].tobytes() for rows in splits.values() for i in range(len(rows))]
    assert len(set(seen)) == len(seen) == 1100


def test_size_of_train_moves_no_other_split():
    more = generate(SIZES | {"train": 200}, 0, SHORT)
    assert equal(more["test"], short_rows()["test"])
    assert equal(more["val"], short_rows()["val"])
    assert equal(more["train"].take(0, 60), short_rows()["train"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"max_depth": 1}, "task.max_depth"),
        ({"max_args": 1}, "max_args=1"),
        ({"max_args": 17}, "max_args=17"),
        ({"min_length": 200}, "min_length=200"),
        ({"max_depth": 2}, "task.min_length"),  # two levels of six arguments never reach 21 tokens
    ],
)
def test_limits_that_no_row_meets_are_refused(changes, key, monkeypatch):
    monkeypatch.setattr(listops_generator, "BARREN_CHUNKS", 2)
    with pytest.raises(ConfigError, match=key):
        short_rows(**changes)


def test_too_few_distinct_rows_are_refused(monkeypatch):
    monkeypatch.setattr(listops_generator, "BARREN_CHUNKS", 4)
    with pytest.raises(
        ConfigError, match=r"only 400 of 500 distinct rows.*task\.sizes"
    ):  # 4 operators, 2 digits
        generate({"train": 500}, 0, Grammar(2, 2, 2, 4, 4))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_the_key_is_refused(seed):
    with pytest.raises(ConfigError, match=r"task\.data_seed"):
        make_task(data_seed=seed)


# --- Encodings ---


@pytest.mark.parametrize(
    ("inputs", "config", "vocabulary", "seq_len"),
    [
        ("s4", "listops", 18, 2048),
        ("lra2020", "listops", 16, 2000),
        ("s4", "listops_short", 18, 136),
        ("lra2020", "listops_short", 16, 128),
    ],
)
def test_vocabulary_and_length_are_the_protocols(inputs, config, vocabulary, seq_len):
    task = make_task(inputs, config=config)
    assert (len(task.vocab), task.seq_len, task.num_classes) == (vocabulary, seq_len, 10)
    assert task.vocab[-15:] == TOKENS == tuple(sorted(TOKENS))


def test_s4_ends_with_one_eos_and_lra2020_does_not():
    tokens = listops_generator.parse_text("[MAX 0 9 ]")
    assert listops.encode(tokens, "s4").tolist() == [13, 3, 12, 17, 2]
    assert listops.encode(tokens, "lra2020").tolist() == [11, 1, 10, 15]
    assert make_task("s4").to_text(listops.encode(tokens, "s4")) == "[MAX 0 9 ] <eos>"


@pytest.mark.parametrize(("inputs", "longest"), [("s4", 129), ("lra2020", 128)])
def test_length_that_would_cut_a_row_is_refused(inputs, longest):
    assert make_task(inputs, seq_len=longest).seq_len == longest
    with pytest.raises(ConfigError, match=r"task\.seq_len"):
        make_task(inputs, seq_len=longest - 1)


def test_unknown_source_and_protocol_are_refused():
    with pytest.raises(ConfigError, match=r"task\.source=web"):
        make_task(source="web")
    with pytest.raises(ConfigError, match=r"protocol\.inputs=s5"):
        make_task("s5")


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_examples_decode_to_their_answers(inputs):
    task = make_task(inputs)
    for split in SPLITS:
        examples = list(task.examples(split))
        assert len(examples) == SIZES[split] == task.split_sizes()[split]
        for ids, label in examples:
            text = task.to_text(ids).removesuffix(" <eos>")
            assert evaluate(listops_generator.parse_text(text)) == label


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_reference_lines_by_hand(inputs):
    rows = [
        "[MAX 1 2 ]",
        "[MAX 1 2 ]",
        "[MAX 0 9 ]",
        "[MIN 0 3 ]",
        "[MIN 0 0 ]",
        "[SM 9 3 ]",
        "[MED 9 9 ]",
    ]
    tokens = [listops_generator.parse_text(row) for row in rows]
    ids = np.stack([np.pad(listops.encode(row, inputs), (0, 3)) for row in tokens])
    train = SimpleNamespace(
        inputs=ids, labels=np.array([evaluate(row) for row in tokens], np.uint8)
    )
    test = SimpleNamespace(
        inputs=ids[[0, 2, 3, 5]], labels=train.labels[[0, 2, 3, 5]]
    )  # answers 2, 9, 0, 2
    lines = make_task(inputs).reference_lines({"train": train, "test": test})
    assert (lines["majority"], lines["root_operator"]) == (0.5, 0.75)
    assert lines["root_and_direct_digits"] == 1.0  # these rows have no other arguments


def test_tokens_and_digits_of_the_root_are_counted():
    tokens = listops_generator.parse_text("[MAX 1 1 [SM 7 [MIN 2 3 ] 1 ] 4 ]")
    for inputs, special in (("s4", 3), ("lra2020", 1)):
        ids = np.pad(listops.encode(tokens, inputs), (0, 4))[None].repeat(2000, axis=0)
        bag, direct = listops.bags_of_tokens(ids, special)
        names = {TOKENS[i]: n for i, n in enumerate(bag[-1].tolist()) if n}
        assert names == {
            **{"1": 3, "2": 1, "3": 1, "4": 1, "7": 1},
            **{"[MAX": 1, "[MIN": 1, "[SM": 1, "]": 3},
        }
        assert {i: n for i, n in enumerate(direct[-1].tolist()) if n} == {1: 2, 4: 1}


def test_reference_lines_of_short_rows_have_their_order():
    """Root operator 26.6, bag 22.7, both 30.4, direct digits 46.8 % on all 96,000 rows."""
    task = make_task(sizes={"train": 2000, "val": 1, "test": 800}, config="listops_short")
    examples = {name: list(task.examples(name)) for name in ("train", "test")}
    splits = {
        name: SimpleNamespace(
            inputs=np.stack([np.pad(x, (0, task.seq_len - len(x))) for x, _ in rows]),
            labels=np.array([label for _, label in rows]),
        )
        for name, rows in examples.items()
    }
    lines = task.reference_lines(splits)
    assert lines["bag_of_tokens"] == pytest.approx(0.227, abs=0.06)
    assert lines["root_operator"] == pytest.approx(0.266, abs=0.06)
    assert lines["root_and_bag_of_tokens"] == pytest.approx(0.304, abs=0.06)
    assert lines["root_and_direct_digits"] == pytest.approx(0.468, abs=0.06)


# --- The release ---


@pytest.fixture
def release(tmp_path):
    """A release of generated rows, and the folder that holds its files."""
    folder = tmp_path / "listops-1000"
    listops.export_tsv(short_rows(), folder)
    return tmp_path, folder


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_exported_rows_are_read_back(release, inputs):
    data_root, _ = release
    generated, released = make_task(inputs), make_task(inputs, data_root, source="release")
    for split in SPLITS:
        pairs = zip(generated.examples(split), released.examples(split), strict=True)
        assert all(
            np.array_equal(one.inputs, other.inputs) and one.label == other.label
            for one, other in pairs
        )


def test_export_overwrites_nothing(tmp_path):
    (tmp_path / "basic_val.tsv").write_text("mine")
    with pytest.raises(LraError, match=r"basic_val\.tsv exists; choose an empty folder"):
        make_task().export(dict.fromkeys(SPLITS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["basic_val.tsv"]
    assert (tmp_path / "basic_val.tsv").read_text() == "mine"


def test_archive_of_listops_alone_is_taken(tmp_path):
    listops.export_tsv(short_rows(), tmp_path / "made")
    with tarfile.open(tmp_path / "listops-1000.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made", "listops-1000")
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "lra_release.gz").write_bytes(b"not looked at")
    store = prepare(make_task(data_root=tmp_path, source="release"), tmp_path)
    assert len(store.splits["test"]) == SIZES["test"]


@pytest.mark.parametrize("nesting", [".", "listops-1000", "lra_release/listops-1000"])
def test_release_is_found_in_any_nesting(tmp_path, nesting):
    listops.export_tsv(short_rows(), tmp_path / nesting)
    assert (
        len(list(make_task(data_root=tmp_path, source="release").examples("test"))) == SIZES["test"]
    )


def test_inner_copy_of_a_nested_release_comes_first(tmp_path):
    listops.export_tsv(short_rows(), tmp_path / "lra_release" / "lra_release" / "listops-1000")
    listops.export_tsv({"test": short_rows()["val"]}, tmp_path / "lra_release" / "listops-1000")
    listops.export_tsv(short_rows(min_length=22), tmp_path / "listops-1000")
    files = make_task(data_root=tmp_path, source="release").source_files()
    assert [file.parent.relative_to(tmp_path).as_posix() for file in files] == [
        "lra_release/lra_release/listops-1000"
    ] * 3


def test_missing_release_says_what_where_and_how(tmp_path):
    task = make_task(data_root=tmp_path, source="release")
    with pytest.raises(
        DataError, match=r"listops-1000 with basic_train\.tsv.*task\.source=generated"
    ) as caught:
        prepare(task, tmp_path)
    assert str(tmp_path) in str(caught.value)


def with_line(lines, row, text):
    return [*lines[:row], text, *lines[row + 1 :]]


SPOILT = {
    "no header": (lambda lines: lines[1:], "row 0: the header is"),
    "no file content": (lambda lines: [], "row 0: the header is ''"),
    "cut inside a row": (
        lambda lines: [*lines[:20], lines[20][:40]],
        "row 20: found the answer ''",
    ),
    "unknown token": (
        lambda lines: with_line(lines, 3, "( ( ( [MUL 1 ) 2 ) ] )\t2"),
        "row 3: unknown token '\\[MUL'",
    ),
    "no brackets": (
        lambda lines: with_line(lines, 4, "( ( ( MAX 1 ) 2 ) )\t2"),
        "row 4: no closing bracket",
    ),
    "wrong answer": (
        lambda lines: with_line(lines, 5, "[MAX 1 2 ]\t1"),
        "row 5: .* 1, but the row evaluates to 2",
    ),
    "no digit": (
        lambda lines: with_line(lines, 6, "[MAX 1 2 ]\t10"),
        "row 6: found the answer '10'",
    ),
    "open bracket": (
        lambda lines: with_line(lines, 7, "[MAX 1 [MIN 2 3 ]\t1"),
        "row 7: 1 brackets left open",
    ),
    "blank row": (lambda lines: with_line(lines, 8, ""), "row 8: found the answer ''"),
    "not text": (lambda lines: with_line(lines, 9, "[MAX 1 \u00e9 ]\t1"), "row 9: unknown token"),
    "too long": (
        lambda lines: with_line(lines, 10, f"[MAX {'1 ' * 127}]\t1"),
        r"row 10: 129 tokens.*task\.max_length=128",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_file_is_refused_with_its_row(release, fault):
    data_root, folder = release
    spoil, message = SPOILT[fault]
    file = folder / "basic_test.tsv"
    file.write_text(
        "".join(line + "\n" for line in spoil(file.read_text().splitlines())), encoding="utf-8"
    )
    with pytest.raises(DataError, match=message) as caught:
        list(make_task(data_root=data_root, source="release").examples("test"))
    assert "basic_test.tsv" in str(caught.value)


def test_store_is_another_after_a_change_of_a_file(release):
    data_root, folder = release
    before = store_name(make_task(data_root=data_root, source="release"))
    with open(folder / "basic_val.tsv", "a") as file:
        file.write("[MAX 1 2 ]\t2\n")
    assert store_name(make_task(data_root=data_root, source="release")) != before


@pytest.mark.parametrize(
    ("rows", "message"), [(20, "20 examples in test .*listops-1000, expected 30"), (31, "31 exam")]
)
def test_another_number_of_rows_is_refused(release, rows, message):
    data_root, folder = release
    file = folder / "basic_test.tsv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[1]][: 1 + rows]))
    with pytest.raises(DataError, match=message):
        prepare(make_task(data_root=data_root, source="release"), data_root)
