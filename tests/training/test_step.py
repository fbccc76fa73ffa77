"""What a step computes does not depend on how it is cut: micro-batches, rematerialisation, precision, where the data lie."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import lra
from lra.config.build import data_arguments
from lra.config.options import options
from lra.data.store import prepare
from lra.errors import ConfigError, DataError, LraError, PreemptedError
from lra.runs.records import read_record, run_path
from lra.training import memory, trainer
from lra.training.memory import compiled_bytes
from lra.training.micro_batch import halvings, largest_that_fits, micro_batch_sizes
from lra.training.prefetch import on_device
from lra.training.setup import Setup
from lra.training.state import State, copy_tree
from lra.training.step import compile_program

MODELS = options("model")
EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")


@pytest.fixture(scope="module")
def made(data_root):
    """(setup, training data) of a tiny run with more overrides."""
    from tiny import TINY

    def make(*overrides):
        cfg = lra.compose([*TINY, f"data.root={data_root}", "trainer.batch_size=8", *overrides])
        setup = Setup(cfg)
        return setup, on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])

    return make


def state_of(setup):
    params, stats = copy_tree((setup.params, setup.batch_stats))
    return State(jnp.int32(0), params, stats, setup.tx.init(params), jnp.zeros(3), jnp.bool_(True))


def trained(setup, data, steps, micro_batch=None):
    run = compile_program(setup, 8, micro_batch).run
    return jax.device_get(run(state_of(setup), setup.constants, data, jnp.int32(steps)))


def assert_close(tree, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), tree, other)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


# ---- micro-batches


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


def test_each_micro_batch_drops_other_units(made):
    setup, data = made("model=lru", "backbone.norm=none", "backbone.dropout=0.5")
    twice = jax.tree.map(lambda x: jnp.repeat(x[:1], 64, axis=0), data)  # every example the same
    two, eight = (
        float(
            compile_program(setup, size, 1)
            .run(state_of(setup), setup.constants, twice, jnp.int32(1))
            .metric_sums[0]
        )
        for size in (2, 8)
    )
    # were each of 8 micro-batches of one dropped alike, the sum of losses would be 4 times that of 2 of them
    assert abs(eight - 4 * two) > 1e-3


def test_sizes_divide_the_batch_and_the_devices_share_them():
    assert micro_batch_sizes(12) == [12, 6, 4, 3, 2, 1]
    assert micro_batch_sizes(12, devices=4) == [12, 4]
    assert halvings(48) == [48, 24, 12, 6, 3, 1]
    assert halvings(50, devices=5) == [50, 25, 10, 5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.micro_batch=3",
            "trainer.micro_batch=3 must be a divisor of trainer.batch_size=4; take 2 or 4",
        ),
        ("trainer.micro_batch=8", "divisor of trainer.batch_size=4; take 2 or 4, or auto"),
        (
            "trainer.micro_batch=0",
            "trainer.micro_batch=0 must be a whole number of at least 1 or auto or null",
        ),
        (
            "trainer.micro_batch=auto",
            "trainer.micro_batch=auto would let the free memory choose .* that batch norm sees",
        ),
        ("trainer.micro_batch=most", "trainer.micro_batch=most must be a whole number"),
        ("trainer.devices=99", "trainer.devices=99: this process has .* take at most"),
        ("trainer.devices=0", "trainer.devices=0 must be a whole number"),
        (
            "trainer.precision=fp16",
            "trainer.precision=fp16 is unknown; choose one of float32, tf32, bf16",
        ),
        ("trainer.remat=all", "trainer.remat=all is unknown; choose one of none, block, dots"),
        ("data.placement=disk", "data.placement=disk is unknown; choose one of auto, device, host"),
        ("trainer.deterministic=1", "trainer.deterministic=1 must be true or false"),
    ],
)
def test_bad_values_are_refused_in_one_line(tiny, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        lra.train([*tiny, override])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*"))


def test_auto_takes_the_largest_micro_batch_that_the_memory_holds(tiny, made, monkeypatch, capsys):
    # activations, not the sum of gradients, take the memory
    longer = ["model=lru", "task.max_length=250", "backbone.norm=layer"]
    setup, data = made("trainer.batch_size=4", *longer)
    needs = {}
    for size in (4, 2):
        run = compile_program(setup, 4, size).run
        needs[size] = compiled_bytes(
            run.lower(state_of(setup), setup.constants, data, np.int32(0)).compile()
        )
    assert needs[2] < needs[4]
    monkeypatch.setattr(memory, "device_bytes", lambda device: needs[4] - 1)
    here = [*tiny, *longer, "trainer.micro_batch=auto", "trainer.steps=4", "trainer.eval_every=4"]
    monkeypatch.setattr(trainer.Rate, "steps_per_call", lambda self, done, seconds: 1)
    made_sizes = []
    monkeypatch.setattr(
        trainer,
        "compile_program",
        lambda *args: made_sizes.append(args[2]) or compile_program(*args),
    )
    advance = trainer.Reporter.advance
    monkeypatch.setattr(trainer.Reporter, "advance", lambda self, *_: os.kill(os.getpid(), 15))
    with pytest.raises(PreemptedError):
        lra.train(here)
    found = re.search(
        r"micro-batch 2 of 4 examples \(4 needs .*\); evaluations take (\d+)",
        capsys.readouterr().out,
    )
    assert int(found[1]) < 256  # which would need more than the step
    assert made_sizes == [4, 2]  # what fitted is what trains
    # a start that ends before it trains leaves what the next one goes by
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "prepare", lambda *_, **__: (_ for _ in ()).throw(DataError("gone")))
        with pytest.raises(DataError):
            lra.train([*here, "resume=auto"])
    cfg = lra.compose(here)
    kept = read_record(run_path(cfg.output.root, trainer.run_config(cfg), dict(cfg.names)))
    assert (kept["status"], kept["step"], kept["micro_batch"]) == ("failed", 1, 2)
    assert kept["data"]["splits"]["train"]["count"] == 64
    # with all the memory in the world, a resumed run keeps what it began with
    monkeypatch.setattr(memory, "device_bytes", lambda device: None)
    monkeypatch.setattr(trainer.Reporter, "advance", advance)
    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [1]
    assert (resumed["micro_batch"], resumed["eval_batch"]) == (2, int(found[1]))
    assert [(part["step"], part["count"], part["micro_batch"]) for part in resumed["segments"]] == [
        (0, 1, 2),
        (1, 1, 2),
    ]
    explicit = lra.train([*here, "trainer.micro_batch=2", f"trainer.eval_batch_size={found[1]}"])
    assert explicit["metrics"] == resumed["metrics"]


def test_auto_halves_where_the_device_runs_out_of_memory(monkeypatch):
    tried = []

    class Full:
        def __init__(self, size):
            self.size = size

        def lower(self, *args):
            return jax.jit(lambda: 0).lower()

        def __call__(self):
            tried.append(self.size)
            if self.size > 2:
                raise EXHAUSTED
            return jnp.zeros(())

    def trial(size):
        return Full(size), ()

    found, needs = largest_that_fits("a micro-batch", [8, 4, 2, 1], trial, lambda fits: fits)
    assert (found, tried, list(needs)) == (2, [8, 4, 2], [8, 4, 2])
    with pytest.raises(
        LraError, match=r"out of memory even at a micro-batch of 4.*trainer.remat=block"
    ):
        largest_that_fits("a micro-batch", [8, 4], trial, lambda fits: fits)
    # what the compiler says is enough, and several devices of a CPU have one memory
    monkeypatch.setattr(memory, "compiled_bytes", lambda compiled: 300)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1000)
    tried.clear()
    assert (
        largest_that_fits("a micro-batch", [8, 4], trial, lambda fits: fits, sharing=3, call=False)[
            0
        ]
        == 8
    )
    with pytest.raises(LraError, match="out of memory even at a micro-batch of 4"):
        largest_that_fits("a micro-batch", [8, 4], trial, lambda fits: fits, sharing=4)
    assert not tried


# ---- rematerialisation


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
    """What lies between the forward and the backward pass, parameters included. Not XLA's own count of the compiled step:
    on CPUs it moves what is computed again to the front and saves nothing."""
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


@pytest.mark.parametrize("model", ["stu", "lru", "transformer", "mamba"])
def test_remat_keeps_less_for_the_backward_pass(made, model):
    kept, dots, forgotten = (
        kept_bytes(made, model, policy) for policy in ("none", "dots", "block")
    )
    assert forgotten < 0.5 * kept
    assert forgotten < dots < kept


# ---- precision


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("model", MODELS)
def test_bf16_keeps_float32_where_it_counts(made, monkeypatch, model):
    half, data = made(f"model={model}", "trainer.precision=bf16")
    for place, name in (
        ("attention", "WEIGHT_BYTES"),
        ("linear_attention", "_CPU_FEATURES"),
    ):  # several blocks
        monkeypatch.setattr(
            f"models.ops.{place}.{name}", {"cpu": 1} if name == "WEIGHT_BYTES" else 1
        )
    monkeypatch.setattr("models.mega._ROWS", 8)
    jaxpr = jax.make_jaxpr(compile_program(half, 8).run)(
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


@pytest.mark.parametrize("model", ["stu", "transformer"])
def test_bf16_is_near_float32_and_trains_float32_parameters(made, model):
    (full, data), (half, _) = (
        made(f"model={model}"),
        made(f"model={model}", "trainer.precision=bf16"),
    )
    logits = [
        compile_program(s, 8).apply(
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
    """What a GPU would be asked, seen in the jaxpr; a CPU is asked nothing, so that its numbers are those of before."""

    def asked(precision):
        setup, data = made("model=lru", f"trainer.precision={precision}")
        run = compile_program(setup, 8).run
        jaxpr = jax.make_jaxpr(run)(state_of(setup), setup.constants, data, jnp.int32(1)).jaxpr
        found = [
            e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"
        ]
        return {None if p is None else str(p[0]) for p in found}

    assert asked("float32") == {None, "HIGHEST"}  # the embedding's own wish
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert asked("float32") == {"HIGHEST"}
    assert asked("tf32") == {"HIGH", "HIGHEST"}
