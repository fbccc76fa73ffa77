"""The width that `model.param_count` chooses, and the one line where there is none."""

import json
import shlex

import pytest

import lra
from lra.config.cost import cost
from lra.config.width import Budget, nearest_widths, parse
from lra.errors import ConfigError
from lra.runs.records import config_hash
from lra.training.trainer import run_config

TASK = ["task=listops_short", "backbone.depth=2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params:200k", Budget(200_000, 0.1)),
        ("params:1.5M", Budget(1_500_000, 0.1)),
        ("params:12345", Budget(12_345, 0.1)),
        ("params:lru", Budget("lru", 0.1)),
        ("params:lru+-5%", Budget("lru", 0.05)),
        ("params:200k+-0.5%", Budget(200_000, 0.005)),
    ],
)
def test_budget_is_a_number_or_a_model_and_a_tolerance(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["200k", "params", "params:", "params:+-10%", "params:200k+-5", "flops:3", 3, True, [1]]
)
def test_anything_else_is_one_line_with_examples(text):
    with pytest.raises(
        ConfigError, match=r"model.param_count=.*params:200k, params:lru or params:200k\+-5%"
    ):
        parse(text)


@pytest.mark.parametrize("text", ["params:0", "params:lru+-0%", "params:lru+-100%"])
def test_senseless_number_is_refused(text):
    with pytest.raises(ConfigError, match="at least 1 parameter, and a tolerance above 0"):
        parse(text)


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
    cfg = lra.compose([*TASK, "model=lru", "model.param_count=params:50k"])
    width = cfg.backbone.width
    found = cost(cfg)
    assert found.width == width
    assert abs(found.params - 50_000) <= 5_000

    def off(width):
        return abs(
            cost(lra.compose([*TASK, "model=lru", f"backbone.width={width}"])).params - 50_000
        )

    assert off(width) == abs(found.params - 50_000)
    assert off(width) < min(off(width - 1), off(width + 1))


def test_widths_that_the_model_refuses_are_not_chosen():
    cfg = lra.compose(
        [*TASK, "model=transformer", "model.num_heads=3", "model.param_count=params:60k"]
    )
    assert cfg.backbone.width % 6 == 0  # rotary heads are even


def test_budget_of_a_named_model_is_what_it_has_by_default_on_this_task():
    by_default = cost(lra.compose(["task=copy", "model=lru"]))
    cfg = lra.compose(
        ["task=copy", "model=stu", "model.num_filters=8", "model.param_count=params:lru"]
    )
    assert cost(cfg).params == pytest.approx(by_default.params, rel=0.1)
    same = lra.compose(["task=copy", "model=lru", "model.param_count=params:lru+-1%"])
    assert same.backbone.width == by_default.width
    assert same.model.param_count == "params:lru+-1%"  # for the record


def test_keys_that_follow_the_width_follow_the_chosen_one():
    words = [
        *TASK,
        "model=lru",
        "model.param_count=params:50k",
        "model.state_size=${backbone.width}",
    ]
    cfg = lra.compose(words)
    assert cfg.model.state_size == cfg.backbone.width
    assert cost(cfg).params == pytest.approx(50_000, rel=0.1)


def test_experiment_and_debug_leave_the_width_to_the_budget():
    cfg = lra.compose(["experiment=listops/quick", "debug=tiny", "model.param_count=params:30k"])
    assert cfg.backbone.depth == 2
    assert cost(cfg).params == pytest.approx(30_000, rel=0.1)


def test_run_is_that_of_the_width():
    """However it was chosen, so that a budget of null changes no run's folder either."""
    chosen = lra.compose([*TASK, "model=lru", "model.param_count=params:50k"])
    typed = lra.compose([*TASK, "model=lru", f"backbone.width={chosen.backbone.width}"])
    other = lra.compose([*TASK, "model=lru", "model.param_count=params:60k"])
    assert (
        config_hash(run_config(chosen))
        == config_hash(run_config(typed))
        != config_hash(run_config(other))
    )
    old = run_config(typed)
    del old["model"]["param_count"]
    assert config_hash(old) == config_hash(run_config(typed))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.param_count=params:20"],
            "no backbone.width is within 10 % of 20 parameters; the nearest: 1 (",
        ),
        (
            ["model=transformer", "model.param_count=params:50k+-0.01%"],
            "of 50,000 parameters; the nearest: 28 (39,754) and 32 (51,314)",
        ),
        (
            ["model.param_count=params:lrv"],
            "model.param_count=params:lrv: unknown model=lrv (did you mean lru",
        ),
        (["model.param_count=params:-5"], "model.param_count=params:-5: unknown model=-5"),
        (["model.param_count=params:null"], "model.param_count=params:null: unknown model=null"),
        (
            ["model.param_count=params:50k", "backbone.width=32"],
            "drop backbone.width=32, or drop model.param_count",
        ),
        (
            ["model.param_count=params:50k", "++backbone.width=32"],
            "drop ++backbone.width=32, or drop model.param_count",
        ),
        (
            ["model=lru", "model.param_count=params:50k", "model.state_size=0"],
            "model.state_size=0 must be at least 1",
        ),
        (["model.param_count=params:50k", "backbone.depth=0"], "backbone.depth=0 must be"),
        (
            ["model.param_count=3"],
            "model.param_count=3 must be a number of parameters or a model's name",
        ),
    ],
)
def test_budget_that_cannot_be_met_is_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        lra.compose(["task=listops_short", *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sweep_gives_every_model_the_same_budget(lra_command, tiny, tmp_path):
    words = [*tiny, "model=lru,transformer", "model.param_count=params:lru+-20%"]
    done = lra_command("train", "-m", *words, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").rglob("record.json")]
    by_model = {record["model"]: record for record in records}
    assert by_model["lru"]["config"]["backbone"]["width"] == 16  # debug=tiny's
    target = by_model["lru"]["params"]["total"]
    for record in records:
        width, total = record["config"]["backbone"]["width"], record["params"]["total"]
        assert total == pytest.approx(target, rel=0.2)
        assert (
            f"model.param_count=params:lru+-20%: backbone.width={width}, {total:,} parameters"
            in done.stdout
        )
        again = lra.compose(shlex.split(record["command"])[2:])
        assert config_hash(run_config(again)) == config_hash(record["config"])


def test_run_with_a_budget_is_found_again(lra_command, tiny):
    words = [*tiny, "model=lru", "model.param_count=params:9k", "resume=auto"]
    first = lra_command("train", *words)
    assert first.returncode == 0, first.stderr
    again = lra_command("train", *words)
    assert again.returncode == 0, again.stderr
    assert "step " not in again.stdout  # finished, shown and not repeated


def test_model_in_a_folder_of_ones_own_has_a_budget(lra_command, tiny, tmp_path):
    (tmp_path / "myconf" / "model").mkdir(parents=True)
    yaml = (lra.config.options.CONF / "model" / "lru.yaml").read_text()
    (tmp_path / "myconf" / "model" / "mine.yaml").write_text(yaml)
    for budget in ("params:9k", "params:mine"):
        words = [
            "--config-dir",
            tmp_path / "myconf",
            *tiny,
            "model=mine",
            f"model.param_count={budget}",
        ]
        done = lra_command("train", *words)
        assert done.returncode == 0, done.stderr
        assert f"model.param_count={budget}: backbone.width=" in done.stdout
