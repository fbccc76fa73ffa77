"""YAML files of a user that cannot be read are one line with file, line, column and reason."""

import pytest

from lra.cli import main
from lra.config.compose import compose
from lra.errors import ConfigError

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 20)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: {", ", line 2, column 5: expected the node content, but found "),
        ("a: 1\n\tb: 2", ", line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: 1\na: 2", ", line 2, column 1: found duplicate key a"),
        ("a: *b", ", line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object/apply:os.getcwd []", ", line 1, column 4: could not determine a"),
        ("a: \0", ": unacceptable character #x0000"),
        ("a: ${b", ": no viable alternative at input '${b'"),
        ("- a\n- b", ": expected a mapping, lines such as KEY: VALUE"),
        ("word", ": expected a mapping"),
        ("# @package a b c\na: 1", ": Too many components in"),
        (BOMB, ": its aliases repeat values more than 100,000 times"),
        ("a: &a [*a]", ": its aliases repeat values"),
        ("a: " + "[" * 3000, ": nested too deeply"),
        (b"a: \xff", ": 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_file_that_cannot_be_read_is_one_line(tmp_path, text, message):
    file = tmp_path / "model" / "mine.yaml"
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        compose([f"hydra.searchpath=[file://{tmp_path}]", "model=mine"])
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "mine.yaml, line 1, column 5: expected the node content"),
        ("defaults: 3", "defaults must be a list (got int)"),
        ("defaults: [nope]", "unknown model=nope"),
        ("state_size: 4", "model._partial_ must be true"),
        (
            "_target_: nowhere.Mixer\n_partial_: true",
            "cannot be imported: No module named 'nowhere'",
        ),
        (
            "_target_: models.lru.LRU\n_partial_: true\nnope: 1",
            "model.state_size is missing; models.lru.LRU has no default",
        ),
    ],
)
def test_model_in_a_folder_of_ones_own_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, tiny, text, message
):
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(text)
    assert main(["train", f"--config-dir={tmp_path}", *tiny, "model=mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lra: error: ")
    assert message in line


def test_other_files_of_the_folder_may_be_broken(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "broken.yaml").write_text("a: [")
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [lru]\na: &a 8\nstate_size: *a\n")
    cfg = compose([f"hydra.searchpath=[file://{tmp_path}]", "model=mine"])
    assert cfg.model.state_size == 8
