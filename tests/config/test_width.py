"""`model.param_count` chooses the nearest width, or is refused with one line."""

import json
import shlex

import pytest
from omegaconf import OmegaConf

import lra
from lra.cli import main
from lra.config.build import build_task
from lra.config.compose import run_config
from lra.config.cost import cost
from lra.config.options import CONF
from lra.config.width import count, nearest_widths, parse
from lra.errors import ConfigError
from lra.report.evaluate import evaluate_run
from lra.runs.records import config_hash

TASK = ["task=listops_short", "backbone.depth=1"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("200k", (200_000, 0.1)),
        ("1.5M", (1_500_000, 0.1)),
        ("12345", (12_345, 0.1)),
        (12345, (12_345, 0.1)),
        (2e5, (200_000, 0.1)),
        ("lru", ("lru", 0.1)),
        ("lru+-5%", ("lru", 0.05)),
        ("200k+-0.5%", (200_000, 0.005)),
    ],
)
def test_value_is_a_number_or_a_model_and_a_tolerance(value, expected):
    assert parse(value) == expected


@pytest.mark.parametrize("value", ["", "+-10%", "200k+-5", "flops:3", True, [1]])
def test_anything_else_is_one_line_with_examples(value):
    with pytest.raises(ConfigError, match=r"model.param_count=.* 200k, lru or 200k\+-5%"):
        parse(value)


@pytest.mark.parametrize("value", [0, "0", "lru+-0%", "lru+-100%"])
def test_senseless_number_is_refused(value):
    with pytest.raises(ConfigError, match="at least 1 parameter, and a tolerance above 0"):
        parse(value)


def test_old_form_is_answered_with_the_new_one():
    with pytest.raises(ConfigError, match=r"an old form; set model.param_count=lru\+-5%$"):
        lra.compose(["model.param_count=params:lru+-5%"])


def quadratic(multiple, *refused):
    return lambda w: None if w % multiple or w in refused else w * w + 5 * w


@pytest.mark.parametrize("guess", [1, 7, 40, 5000])
@pytest.mark.parametrize(
    ("params", "target", "expected"),
    [
        (quadratic(1), 24, [3, 4]),  # exactly met: 3 x 3 + 15
        (quadratic(1), 23, [2, 3]),
        (quadratic(1), 1, [1]),
        (quadratic(12), 1000, [24, 36]),
        (quadratic(16), 100, [16]),
        (quadratic(4, 28), 900, [24, 32]),  # 28 would have 924
        (quadratic(1), 10_000_000, [3159, 3160]),
        (lambda w: None, 100, []),
    ],
)
def test_search_finds_the_widths_on_both_sides(params, target, expected, guess):
    found = nearest_widths(params, target, guess)
    assert list(found) == expected
    assert all(params(width) == number for width, number in found.items())


def test_chosen_width_is_the_nearest():
    cfg = lra.compose([*TASK, "model=lru", "model.param_count=50000"])
    task, width = build_task(cfg), cfg.backbone.width

    def off(width):
        return abs(count(OmegaConf.merge(cfg, {"backbone": {"width": width}}), task) - 50_000)

    assert cost(cfg).width == width
    assert off(width) == abs(cost(cfg).params - 50_000) <= 5_000
    assert off(width) < min(off(width - 1), off(width + 1))


def test_widths_that_the_model_refuses_are_not_chosen():
    cfg = lra.compose([*TASK, "model=transformer", "model.num_heads=3", "model.param_count=60k"])
    assert cfg.backbone.width % 6 == 0  # rotary heads are even


def test_param_count_of_a_named_model_is_that_of_its_defaults_on_the_task():
    by_default = cost(lra.compose(["task=copy", "model=lru"]))
    words = ["task=copy", "model=stu", "model.num_filters=8", "model.param_count=lru+-9%"]
    cfg = lra.compose(words)
    assert cost(cfg).params == pytest.approx(by_default.params, rel=0.09)
    assert cfg.model.param_count == "lru+-9%"  # for the record


def test_keys_that_follow_the_width_follow_the_chosen_one():
    follows = "model.state_size=${backbone.width}"
    cfg = lra.compose([*TASK, "model=lru", "model.param_count=50k", follows])
    assert cfg.model.state_size == cfg.backbone.width
    assert cost(cfg).params == pytest.approx(50_000, rel=0.1)


def test_width_of_an_experiment_and_of_debug_is_replaced():
    cfg = lra.compose(["experiment=listops/quick", "debug=tiny", "model.param_count=30k"])
    assert cfg.backbone.depth == 2
    assert cost(cfg).params == pytest.approx(30_000, rel=0.1)


def test_run_with_a_param_count_is_the_run_with_that_width():
    chosen = lra.compose([*TASK, "model=lru", "model.param_count=50k"])
    typed = run_config(lra.compose([*TASK, "model=lru", f"backbone.width={chosen.backbone.width}"]))
    assert config_hash(run_config(chosen)) == config_hash(typed)
    before_the_key_existed = {**typed, "model": {**typed["model"]}}
    del before_the_key_existed["model"]["param_count"]
    assert config_hash(before_the_key_existed) == config_hash(typed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.param_count=20"],
            "no backbone.width is within 10 % of 20 parameters; the nearest: 1 (",
        ),
        (
            ["model=transformer", "model.param_count=50k+-0.01%"],
            "of 50,000 parameters; the nearest: 60 (45,630) and 64 (51,808)",
        ),
        (
            ["model.param_count=lrv"],
            "model.param_count=lrv: unknown model=lrv (did you mean lru",
        ),
        (["model.param_count=-5"], "model.param_count=-5: unknown model=-5"),
        (
            ["model.param_count=50k", "backbone.width=32"],
            "drop backbone.width=32, or drop model.param_count",
        ),
        (
            ["model.param_count=50k", "++backbone.width=32"],
            "drop ++backbone.width=32, or drop model.param_count",
        ),
        (
            ["model=lru", "model.param_count=50k", "model.state_size=0"],
            "model.state_size=0 must be at least 1",
        ),
        (["model.param_count=50k", "trainer.steps=0"], "trainer.steps=0 must be"),
        (
            ["model.param_count=3%"],
            "model.param_count=3% must be a number of parameters or the name of a model",
        ),
    ],
)
def test_param_count_that_no_width_gives_is_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        lra.compose([*TASK, *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def lra_train(monkeypatch, capsys, tmp_path):
    """Runs `lra train` in this process; returns what it prints."""
    monkeypatch.setattr("sys.argv", ["lra"])

    def run(*words):
        assert main(["train", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_models_of_a_sweep_have_one_size_and_are_resumed_and_scored(lra_train, tiny, tmp_path):
    words = [*tiny, "model=lru,transformer", "model.param_count=lru+-20%"]
    printed = lra_train("-m", *words, "resume=auto")
    files = {file.parts[-3]: file for file in (tmp_path / "runs").rglob("record.json")}
    records = {model: json.loads(file.read_text()) for model, file in files.items()}
    assert records["lru"]["config"]["backbone"]["width"] == 16  # that of debug=tiny
    target = records["lru"]["params"]["total"]
    for model in ("lru", "transformer"):
        width = records[model]["config"]["backbone"]["width"]
        total = records[model]["params"]["total"]
        assert total == pytest.approx(target, rel=0.2)
        chosen = f"model.param_count=lru+-20%: backbone.width={width}, {total:,} parameters"
        assert chosen in printed
    again = lra.compose(shlex.split(records["transformer"]["command"])[2:])
    assert config_hash(run_config(again)) == config_hash(records["transformer"]["config"])

    assert "step " not in lra_train("-m", *words, "resume=auto")  # finished: shown, not repeated
    assert "identical, bit for bit" in evaluate_run(files["lru"].parent)


@pytest.mark.slow
def test_model_in_a_folder_of_ones_own_has_a_param_count(lra_train, tiny, tmp_path):
    (tmp_path / "myconf" / "model").mkdir(parents=True)
    yaml = (CONF / "model" / "lru.yaml").read_text()
    (tmp_path / "myconf" / "model" / "mine.yaml").write_text(yaml)
    own = ["--config-dir", tmp_path / "myconf", *tiny, "model=mine"]
    assert "model.param_count=mine: backbone.width=16," in lra_train(*own, "model.param_count=mine")
