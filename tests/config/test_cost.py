"""Costs of models, against sums by hand and against XLA where its count is right."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lra
from lra.config.build import build_task
from lra.config.cost import abstract_model, cost, parameters, state_size
from lra.config.options import options


@pytest.mark.fast_variants(1)
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
    graph, state = nnx.split(abstract_model(cfg, task))
    run = jax.jit(lambda state, ids, lengths: nnx.merge(graph, state)(ids, lengths))
    ids = jax.ShapeDtypeStruct((1, task.seq_len), jnp.int32)
    compiled = run.lower(state, ids, jax.ShapeDtypeStruct((1,), jnp.int32)).compile()
    assert cost(cfg).flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


def test_operations_of_a_recurrence_grow_with_its_length():
    """XLA's count does not, because it counts the body of a loop once."""

    def of(length):
        return cost(lra.compose(["model=lru", "task=listops_short", f"task.max_length={length}"]))

    short, long = of(120), of(240)
    assert long.params == short.params
    assert long.flops == pytest.approx(2 * short.flops, rel=0.05)


@pytest.mark.fast_variants(6)
@pytest.mark.parametrize("task", options("task"))
def test_every_task_has_costs(task):
    found = cost(lra.compose([f"task={task}", "model=linear", "backbone.depth=1"]))
    assert found.params > 1000
    assert found.flops > found.params
    assert found.state is None  # not causal


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


def test_parameters_are_those_that_are_trained():
    cfg = lra.compose(["task=listops_short", "model=stu", "backbone.width=8", "backbone.depth=1"])
    model = abstract_model(cfg, build_task(cfg))
    assert parameters(model.blocks[0].mixer) == (3 + 24 + 24) * 8 * 8  # M_u, M+, M-; no filters
    assert state_size(model) > 0
