"""A step gives the same update however its batch is cut, rematerialised or rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from step_checks import assert_close, state_of, trained

import lra
from lra.config.options import options
from lra.training.step import make_step_functions

MODELS = options("model")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stu", "transformer"])
def test_micro_batches_make_the_update_of_the_whole_batch(made, model):
    setup, data = made(f"model={model}", "backbone.norm=layer", "optim.lr=0.01")
    # sums and means of gradients, before Adam divides small ones by small ones
    whole, cut = trained(setup, data, 1), trained(setup, data, 1, micro_batch=2)
    assert_close(whole.opt, cut.opt, atol=1e-6)
    np.testing.assert_allclose(whole.metric_sums, cut.metric_sums, rtol=1e-5)
    whole, cut = trained(setup, data, 10), trained(setup, data, 10, micro_batch=4)
    np.testing.assert_allclose(whole.metric_sums, cut.metric_sums, rtol=1e-3)
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(setup.params), strict=True)
    )


@pytest.mark.slow
def test_batch_norm_takes_the_statistics_of_each_micro_batch_in_turn(made):
    setup, data = made("model=lru", "backbone.norm=batch")
    stats = setup.batch_stats
    order = lra.training.step.epoch_order(setup.order_key, 0, len(data.labels))
    for rows in (order[:4], order[4:8]):
        model = nnx.merge(setup.graph, setup.params, stats, setup.constants, copy=True)
        model(
            setup.task.decode(data.inputs[rows]),
            data.lengths[rows],
            train=True,
            rngs=nnx.Rngs(dropout=0),
        )
        stats = nnx.state(model, nnx.BatchStat)
    assert_close(trained(setup, data, 1, micro_batch=4).batch_stats, stats, atol=1e-6)
    whole = trained(setup, data, 1)
    assert any(
        np.abs(a - b).max() > 1e-4
        for a, b in zip(jax.tree.leaves(whole.batch_stats), jax.tree.leaves(stats), strict=True)
    )


@pytest.mark.slow
def test_each_micro_batch_drops_other_units(made):
    setup, data = made("model=lru", "backbone.norm=none", "backbone.dropout=0.5")
    twice = jax.tree.map(lambda x: jnp.repeat(x[:1], 64, axis=0), data)  # every example the same
    two, eight = (
        float(
            make_step_functions(setup, size, 1)
            .train_steps(state_of(setup), setup.constants, twice, jnp.int32(1))
            .metric_sums[0]
        )
        for size in (2, 8)
    )
    # with the same dropout mask in each of the 8 micro-batches, the sum would be 4 times as large
    assert abs(eight - 4 * two) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lru", "mega"])  # batch norm; a mixer that gates the residual
def test_remat_gives_the_same_gradients(made, model):
    def first(policy):
        # no Adam yet, whose first step makes every gradient one: its moments are the gradients
        return trained(
            *made(f"model={model}", "backbone.dropout=0.2", f"trainer.remat={policy}"), 1
        )

    kept, again = first("none"), first("block")
    assert_close(kept.opt, again.opt, atol=1e-6)
    assert_close(kept.batch_stats, again.batch_stats, atol=1e-6)


def kept_bytes(made, model, policy):
    """Bytes stored between the forward and the backward pass, parameters included.

    XLA's analysis of the compiled step is no measure, because XLA:CPU moves the recomputation to
    the front and saves nothing.
    """
    setup, data = made(
        f"model={model}", "task.max_length=254", "backbone.depth=4", f"trainer.remat={policy}"
    )

    def loss(params):
        model = nnx.merge(setup.graph, params, setup.batch_stats, setup.constants, copy=True)
        rngs = nnx.Rngs(dropout=0)
        return model(
            setup.task.decode(data.inputs[:2]), data.lengths[:2], train=True, rngs=rngs
        ).sum()

    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], setup.params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stu", "lru", "transformer", "mamba"])
def test_remat_keeps_less_for_the_backward_pass(made, model):
    kept, dots, forgotten = (
        kept_bytes(made, model, policy) for policy in ("none", "dots", "block")
    )
    assert forgotten < 0.5 * kept
    assert forgotten < dots < kept


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_bf16_keeps_float32_where_it_counts(made, monkeypatch, model):
    half, data = made(f"model={model}", "trainer.precision=bf16")
    for place, name in (
        ("attention", "WEIGHT_BYTES"),
        ("linear_attention", "CPU_FEATURES"),
    ):  # several blocks
        monkeypatch.setattr(
            f"models.ops.{place}.{name}", {"cpu": 1} if name == "WEIGHT_BYTES" else 1
        )
    monkeypatch.setattr("models.mega._ROWS", 8)
    jaxpr = jax.make_jaxpr(make_step_functions(half, 8).train_steps)(
        state_of(half), half.constants, data, jnp.int32(20)
    ).jaxpr
    found = list(equations(jaxpr))
    products = [e.outvars[0].aval.dtype for e in found if e.primitive.name == "dot_general"]
    assert products.count(jnp.bfloat16) >= 6  # forward and backward of two blocks
    for equation in found:  # transforms, softmax and losses
        if equation.primitive.name in ("fft", "exp", "log"):
            assert all(v.aval.dtype != jnp.bfloat16 for v in equation.invars), equation
        assert all(v.aval.dtype != jnp.bfloat16 for v in summed(equation)), equation


def summed(equation):
    """What an equation adds up term by term, over positions or over blocks of them."""
    name = equation.primitive.name
    if name == "scan":
        return equation.outvars[: equation.params["num_carry"]]
    return equation.outvars if name in ("while", "reduce_sum", "cumsum") else []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stu", "transformer"])
def test_bf16_is_near_float32_and_trains_float32_parameters(made, model):
    (full, data), (half, _) = (
        made(f"model={model}"),
        made(f"model={model}", "trainer.precision=bf16"),
    )
    logits = [
        make_step_functions(s, 8).predict(
            s.params, s.batch_stats, s.constants, data.inputs[:8], data.lengths[:8]
        )
        for s in (full, half)
    ]
    assert logits[1].dtype == jnp.float32
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.05
    state = trained(half, data, 20)
    assert int(state.step) == 20
    assert np.isfinite(state.metric_sums).all()
    kept = jax.tree.leaves((state.params, state.batch_stats, state.opt))
    assert all(jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.float32 for x in kept)


def test_float32_asks_an_accelerator_for_all_digits(made, monkeypatch):
    """The jaxpr asks a GPU for full precision or TF32, and a CPU for nothing."""

    def asked(precision):
        setup, data = made("model=lru", f"trainer.precision={precision}")
        run = make_step_functions(setup, 8).train_steps
        jaxpr = jax.make_jaxpr(run)(state_of(setup), setup.constants, data, jnp.int32(1)).jaxpr
        found = [
            e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"
        ]
        return {None if p is None else str(p[0]) for p in found}

    assert asked("float32") == {None, "HIGHEST"}  # the embedding's own wish
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert asked("float32") == {"HIGHEST"}
    assert asked("tf32") == {"HIGH", "HIGHEST"}
