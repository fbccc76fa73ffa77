"""What a model is said to cost, against sums made by hand and against what XLA counts where it counts right."""

import csv
import io

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lra
from lra.config import cost as cost_module
from lra.config.build import build_task, model_builder
from lra.config.cost import cost, parameters, state_size
from lra.config.flops import UncountedError, flops
from lra.config.options import options
from lra.errors import ConfigError
from lra.report.models import cost_table

F32, C64 = jnp.float32, jnp.complex64


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def scanned(x, w):
    return jax.lax.scan(lambda h, _: (h @ w, None), x, length=7)[0]


def chosen_by_value(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: jnp.exp(x))


def chosen_by_platform(x):
    return jax.lax.platform_dependent(x, cpu=jnp.exp, default=lambda x: x @ x)


@jax.custom_vjp
def own_gradient(x):
    return jnp.exp(x)


own_gradient.defvjp(lambda x: (own_gradient(x), x), lambda x, y: (x @ y,))


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (jnp.exp, [shape(3, 5)], 15),
        (lambda x: x.reshape(-1)[::2].astype(jnp.bfloat16), [shape(4, 4)], 0),
        (jnp.matmul, [shape(3, 4), shape(4, 5)], 2 * 3 * 5 * 4),
        (
            lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
            [shape(6, 3, 4), shape(6, 4, 5)],
            6 * 2 * 3 * 5 * 4,
        ),
        (jnp.matmul, [shape(3, 4, dtype=C64), shape(4, 5, dtype=C64)], 4 * 2 * 3 * 5 * 4),
        (jnp.multiply, [shape(7, dtype=C64), shape(7, dtype=C64)], 6 * 7),
        (jnp.add, [shape(7, dtype=C64), shape(7, dtype=C64)], 2 * 7),
        (jnp.sum, [shape(3, 5)], 15),
        (lambda x: jnp.cumsum(x, axis=1), [shape(3, 5)], 15),
        (lambda x: jnp.fft.fft(x), [shape(3, 16, dtype=C64)], 3 * 5 * 16 * 4),
        (lambda x: jnp.fft.rfft(x), [shape(3, 16)], 3 * 5 * 16 * 4 // 2),
        (lambda x: jnp.fft.irfft(x), [shape(3, 9, dtype=C64)], 3 * 5 * 16 * 4 // 2),
        (scanned, [shape(3, 4), shape(4, 4)], 7 * 2 * 3 * 4 * 4),
        (
            lambda x: jax.lax.fori_loop(0, 5, lambda i, h: jnp.exp(h), x),
            [shape(3)],
            5 * (3 + 1),
        ),  # 1: i + 1
        (lambda x: jnp.convolve(x, x[:3], mode="valid"), [shape(10)], 2 * 8 * 3),
        (chosen_by_value, [shape(4, 4)], 1 + 2 * 4**3),
        (chosen_by_platform, [shape(4, 4)], 16 if jax.default_backend() == "cpu" else 2 * 4**3),
        (own_gradient, [shape(4, 4)], 16),
        (lambda x: jax.vjp(own_gradient, x)[1](x), [shape(4, 4)], 16 + 2 * 4**3),
        (jax.checkpoint(jnp.sin), [shape(4)], 4),
        (jax.jit(jnp.tanh), [shape(4)], 4),
    ],
)
def test_operations_are_those_counted_by_hand(function, args, expected):
    assert flops(function, *args) == expected


def test_grouped_convolution_is_counted_by_its_filters():
    x, kernel = shape(2, 10, 6), shape(3, 1, 6)  # each of 6 channels has its own 3 taps

    def convolve(x, kernel):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=numbers, feature_group_count=6
        )

    assert flops(convolve, x, kernel) == 2 * (2 * 8 * 6) * 3


def test_loop_of_unknown_length_is_refused():
    with pytest.raises(UncountedError, match="number of steps"):
        flops(lambda x: jax.lax.while_loop(lambda h: h[0] < 1, jnp.exp, x), shape(3))


@pytest.mark.parametrize(
    "overrides", [["model=transformer"], ["model=linear", "backbone.mlp_ratio=2"], ["model=local"]]
)
def test_operations_of_a_model_without_loops_are_near_those_of_xla(overrides):
    cfg = lra.compose(
        [
            "task=listops_short",
            "backbone.width=128",
            "backbone.depth=2",
            "task.max_length=250",
            *overrides,
        ]
    )
    task = build_task(cfg)
    model = model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0)))
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids, lengths: nnx.merge(graph, state)(ids, lengths))
    compiled = run.lower(
        state, jnp.zeros((1, task.seq_len), jnp.int32), jnp.ones(1, jnp.int32)
    ).compile()
    assert cost(cfg).flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


def test_operations_grow_with_the_length_that_a_recurrence_runs():
    """XLA's own count does not: it sees the loop's body once."""

    def of(length):
        return cost(lra.compose(["model=lru", "task=listops_short", f"task.max_length={length}"]))

    short, long = of(120), of(240)
    assert long.params == short.params
    assert long.flops == pytest.approx(2 * short.flops, rel=0.05)


@pytest.mark.parametrize("task", options("task"))
def test_every_task_has_costs(task):
    found = cost(lra.compose([f"task={task}", "model=linear", "backbone.depth=1"]))
    assert found.params > 1000
    assert found.flops > found.params
    assert found.state is None  # it looks ahead


def test_state_counts_every_layer_and_a_complex_number_twice():
    words = [
        "task=listops_short",
        "backbone.depth=3",
        "backbone.width=8",
        "model=s4d",
        "model.state_size=10",
    ]
    assert cost(lra.compose([*words, "model.bidirectional=false"])).state == 3 * 8 * (10 // 2) * 2
    assert cost(lra.compose([*words, "model.bidirectional=true"])).state is None


def test_parameters_are_what_trains_not_what_is_fixed():
    cfg = lra.compose(["task=listops_short", "model=stu", "backbone.width=8", "backbone.depth=1"])
    model = model_builder(cfg, build_task(cfg))(rngs=nnx.Rngs(params=jax.random.key(0)))
    mixer = model.blocks[0].mixer
    assert parameters(mixer) == (3 + 24 + 24) * 8 * 8  # M_u, M+, M-; no filters
    assert state_size(model) > 0


def test_table_has_a_row_a_model_and_a_reason_where_one_cannot_be_built():
    words = ["task=listops_short", "model=lru,transformer", "backbone.width=9", "backbone.depth=1"]
    rows = list(csv.DictReader(io.StringIO(cost_table(words, "csv"))))
    assert [row["model"] for row in rows] == ["lru", "transformer"]
    expected = cost(lra.compose([*words[:1], "model=lru", *words[2:]]))
    assert (rows[0]["parameters"], rows[0]["FLOPs"]) == (str(expected.params), str(expected.flops))
    assert (rows[0]["width"], rows[0]["depth"], rows[0]["note"]) == ("9", "1", "")
    assert rows[1]["parameters"] == ""
    assert "must be at least 1 and divide backbone.width=9" in rows[1]["note"]
    shown = cost_table(words)
    assert f"{expected.params:,}" in shown
    assert "listops_short, protocol strict" in shown
    assert cost_table(words, "markdown").splitlines()[2].startswith("| model ")
    assert r"\toprule" in cost_table(words, "latex")


def test_table_without_a_loop_of_known_length_keeps_its_parameters(monkeypatch):
    def refuse(*_):
        raise UncountedError("a while loop")

    monkeypatch.setattr(cost_module, "flops", refuse)
    (row,) = csv.DictReader(io.StringIO(cost_table(["task=listops_short", "model=lru"], "csv")))
    assert row["FLOPs"] == ""
    assert int(row["parameters"]) > 0
    assert row["note"] == "operations not counted: a while loop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["listops"], "listops: expected KEY=VALUE words as for `lra train`, such as task=listops"),
        (["task=listop"], "unknown task=listop (did you mean listops"),
        (["model=lrv"], "unknown model=lrv (did you mean lru"),
        (["backbone.depth=0"], "backbone.depth=0 must be a whole number of at least 1"),
    ],
)
def test_what_fails_for_every_model_is_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        cost_table(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table_of_an_experiment_has_its_model():
    (row,) = csv.DictReader(io.StringIO(cost_table(["experiment=listops/quick"], "csv")))
    assert row["model"] == lra.compose(["experiment=listops/quick"]).names.model
