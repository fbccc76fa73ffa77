"""What every model, task and experiment in conf/ has to meet. A new YAML file is tested without anybody editing this one."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hydra.utils import get_class
from omegaconf import OmegaConf

import lra
from lra.config.build import build_task, constructor_arguments, data_arguments, model_builder
from lra.config.cost import abstract_model, cost, state_size
from lra.config.options import options
from lra.data.store import prepare
from lra.errors import ConfigError, DataError
from lra.tasks.base import SPLITS
from lra.training.optimizer import assign_groups
from lra.training.setup import Setup
from lra.training.state import Examples, State
from lra.training.step import compile_program

MODELS, TASKS, EXPERIMENTS, PROTOCOLS = (
    options(g) for g in ("model", "task", "experiment", "protocol")
)
SUPPLIED = {"width", "seq_len", "rngs", "self"}  # what the backbone gives a mixer
BATCH = 3
KNOWN = (
    "text",
    "retrieval",
    "image",
    "scifar",
)  # the tests' own files stand in for their publishers'


@pytest.fixture(scope="module", params=MODELS)
def built(request, data_root):
    """A small model of each kind for the tiny task, its parameters moved off their start (the paper's are zero)."""
    cfg = lra.compose(
        [f"model={request.param}", *TINY_TASK, "backbone.depth=2", "backbone.width=16"]
    )
    task = build_task(cfg)
    model = model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0)))
    graph, params, stats, fixed = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    return Built(request.param, cfg, task, graph, noisy(params), stats, fixed)


def noisy(params):
    keys = nnx.Rngs(noise=1)
    return jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(keys.noise(), x.shape, x.dtype), params
    )


TINY_TASK = ["task=listops_short", "task.max_length=30"]


class Built:
    def __init__(self, name, cfg, task, graph, params, stats, fixed):
        self.name, self.cfg, self.task = name, cfg, task
        self.graph, self.params, self.batch_stats, self.constants = graph, params, stats, fixed

    def model(self, params=None):
        return nnx.merge(
            self.graph,
            self.params if params is None else params,
            self.batch_stats,
            self.constants,
            copy=True,
        )

    def batch(self, seed=0, batch=BATCH):
        rng = np.random.default_rng(seed)
        inputs = rng.integers(3, len(self.task.vocab), (batch, self.task.seq_len))
        lengths = rng.integers(5, self.task.seq_len - 5, batch)
        inputs[np.arange(self.task.seq_len) >= lengths[:, None]] = 0
        return jnp.asarray(inputs, jnp.int32), jnp.asarray(lengths, jnp.int32)


def test_logits_have_shape_and_dtype(built):
    logits = built.model()(*built.batch())
    assert logits.shape == (BATCH, built.task.num_classes)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


def test_every_parameter_has_a_finite_gradient_that_is_not_zero(built):
    inputs, lengths = built.batch()

    def loss(params):
        logits = built.model(params)(inputs, lengths, train=True, rngs=nnx.Rngs(dropout=0))
        return (jax.nn.log_softmax(logits)[:, 0] ** 2).mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(built.params)):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert np.abs(grad).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


def test_padding_changes_nothing(built):
    inputs, lengths = built.batch()
    padding = np.arange(built.task.seq_len)[None, :] >= np.asarray(lengths)[:, None]
    other = jnp.where(padding, 7, inputs)
    assert (other != inputs).any()
    model = built.model()
    np.testing.assert_allclose(model(inputs, lengths), model(other, lengths), atol=1e-5)


def test_padding_changes_no_training_step(built):
    """Batch statistics are taken over real positions only."""
    inputs, lengths = built.batch()
    padding = np.arange(built.task.seq_len)[None, :] >= np.asarray(lengths)[:, None]

    def logits(x):
        return built.model()(x, lengths, train=True, rngs=nnx.Rngs(dropout=0))

    np.testing.assert_allclose(logits(inputs), logits(jnp.where(padding, 7, inputs)), atol=1e-5)


def test_causal_mixers_ignore_the_future(built):
    mixer = built.model().blocks[0].mixer
    if not mixer.causal:
        pytest.skip("looks ahead by design")
    x = jax.random.normal(jax.random.key(1), (2, built.task.seq_len, 16))
    mask = jnp.ones(x.shape[:2], bool)
    cut = built.task.seq_len // 2
    before = mixer(x, mask, train=False, rngs=None)
    after = mixer(x.at[:, cut:].add(1.0), mask, train=False, rngs=None)
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], atol=1e-5)
    assert np.abs(before[:, cut:] - after[:, cut:]).max() > 1e-3


def test_mixers_that_claim_to_look_ahead_do(built):
    mixer = built.model().blocks[0].mixer
    if mixer.causal:
        pytest.skip("causal")
    x = jax.random.normal(jax.random.key(1), (2, built.task.seq_len, 16))
    mask = jnp.ones(x.shape[:2], bool)
    before, after = (
        mixer(x, mask, train=False, rngs=None),
        mixer(x.at[:, -1].add(10.0), mask, train=False, rngs=None),
    )
    assert np.abs(before[:, 0] - after[:, 0]).max() > 1e-5


def test_examples_of_a_batch_do_not_meet(built):
    inputs, lengths = built.batch()
    model = built.model()
    alone = jnp.concatenate([model(inputs[i : i + 1], lengths[i : i + 1]) for i in range(BATCH)])
    np.testing.assert_allclose(model(inputs, lengths), alone, atol=1e-5)
    np.testing.assert_allclose(
        model(inputs[::-1], lengths[::-1]), model(inputs, lengths)[::-1], atol=1e-5
    )


def test_same_seed_same_parameters(built):
    def params(seed):
        return nnx.state(
            model_builder(built.cfg, built.task)(rngs=nnx.Rngs(params=jax.random.key(seed))),
            nnx.Param,
        )

    first, again, other = params(0), params(0), params(1)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, other)))


def test_inputs_longer_than_the_model_was_made_for_are_refused(built):
    inputs, lengths = built.batch()
    with pytest.raises(ValueError, match=r"built for task\.seq_len="):
        built.model()(jnp.pad(inputs, ((0, 0), (0, 1))), lengths)


def test_training_step_returns_what_it_takes(built):
    """Shapes, dtypes and weak types: else the second call would compile again, and a checkpoint would not fit."""
    setup = Setup(built.cfg)
    program = compile_program(setup, 4)
    state = State(
        jnp.int32(0),
        setup.params,
        setup.batch_stats,
        setup.tx.init(setup.params),
        jnp.zeros(3),
        jnp.bool_(True),
    )
    inputs, lengths = built.batch(batch=8)
    data = Examples(inputs.astype(jnp.uint8), lengths, jnp.zeros(8, jnp.int32))
    after = jax.eval_shape(program.run, state, setup.constants, data, jnp.int32(2))
    found, expected = (jax.tree.map(jax.typeof, tree) for tree in (after, state))
    assert found == expected


def test_parameter_count_does_not_grow_with_length(built):
    if getattr(built.model().blocks[0].mixer, "grows_with_length", False):
        pytest.skip(
            "has parameters for each scale of the length by design; its own test counts them"
        )

    def count(length):
        words = [
            f"model={built.name}",
            "task=listops_short",
            f"task.max_length={length}",
            "backbone.width=16",
        ]
        return cost(lra.compose(words)).params

    assert count(30) == count(60)


def test_parameters_that_are_printed_are_those_that_train(built):
    found = cost(built.cfg)
    assert found.params == sum(x.size for x in jax.tree.leaves(built.params))
    assert (found.width, found.depth) == (16, 2)
    assert found.note == ""
    assert found.flops > 2 * built.task.seq_len * 16 * 16


def test_bfloat16_is_near_float32(built):
    """A mixer's own sums and states stay in float32; only what comes in and goes out is rounded."""
    mixer = built.model().blocks[0].mixer
    x = jax.random.normal(jax.random.key(1), (2, built.task.seq_len, 16)).astype(jnp.bfloat16)
    mask = jnp.arange(built.task.seq_len)[None, :] < jnp.asarray([built.task.seq_len, 20])[:, None]
    exact, y = run(mixer, x.astype(jnp.float32), mask), run(mixer, x, mask)
    assert y.dtype == jnp.bfloat16
    real = np.asarray(mask)
    # 8 bits are 0.4 % at each rounding on the way; ours lose 0.2 to 1.2 % of the largest output
    np.testing.assert_allclose(
        y.astype(jnp.float32)[real], exact[real], rtol=0, atol=0.03 * np.abs(exact).max()
    )


def test_padding_changes_nothing_in_16_bits(built):
    """Not even through rounding, where transforms mix all positions."""
    mixer = built.model().blocks[0].mixer
    x = jax.random.normal(jax.random.key(1), (2, built.task.seq_len, 16)).astype(jnp.bfloat16)
    mask = jnp.arange(built.task.seq_len)[None, :] < jnp.asarray([built.task.seq_len, 20])[:, None]
    y, other = run(mixer, x, mask), run(mixer, jnp.where(mask[..., None], x, 100 * x), mask)
    real = np.asarray(mask)
    np.testing.assert_array_equal(y.astype(jnp.float32)[real], other.astype(jnp.float32)[real])


def run(mixer, x, mask):
    extra = {"residual": x} if getattr(mixer, "gates_residual", False) else {}
    return mixer(x, mask, train=False, rngs=None, **extra)


@pytest.mark.parametrize("name", MODELS)
def test_streaming_equals_parallel(name):
    """Where a mixer has a recurrent form, with the option that makes it causal; over more than one of Mega's chunks."""
    mixer, length = causal_mixer(name, 150)
    if not hasattr(mixer, "init_state"):
        pytest.skip("no recurrent form")
    x = jax.random.normal(jax.random.key(1), (2, length, 16))
    parallel = run(mixer, x, jnp.ones(x.shape[:2], bool))
    _, y = jax.lax.scan(
        mixer.step, mixer.init_state(2), x.swapaxes(0, 1)
    )  # refuses a state that changes its shape
    np.testing.assert_allclose(
        y.swapaxes(0, 1), parallel, rtol=0, atol=2e-5 * np.abs(parallel).max()
    )


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_state_does_not_grow_with_length(name):
    def size(max_length):
        cfg = lra.compose(causal_words(name, max_length))
        return state_size(abstract_model(cfg, build_task(cfg)))

    if (short := size(1000)) is None:
        pytest.skip("no recurrent form")
    # the sums of exponentials that stand for STU's filters reach their last, 2 K, here
    assert size(2000) <= 1.1 * short


def causal_mixer(name, max_length):
    """A mixer of the model, made causal where that is an option, its parameters moved off their start; and L."""
    cfg = lra.compose(causal_words(name, max_length))
    task = build_task(cfg)
    graph, params, rest = nnx.split(
        model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0))), nnx.Param, ...
    )
    return nnx.merge(graph, noisy(params), rest).blocks[0].mixer, task.seq_len


def test_recipe_names_parameters_that_exist(built):
    groups, _ = assign_groups(built.cfg.optim, built.params)
    assert sum(group.num_params for group in groups) == sum(
        x.size for x in jax.tree.leaves(built.params)
    )
    assert set(built.cfg.optim.groups or {}) <= {group.name for group in groups}


@pytest.mark.parametrize("name", MODELS)
def test_model_yaml_carries_every_argument(name):
    """So that a typo on the command line is refused, and every default is written in one place."""
    section = lra.compose([f"model={name}"]).model
    wanted = set(inspect.signature(get_class(section._target_).__init__).parameters) - SUPPLIED
    assert set(constructor_arguments(section)) - {"_target_", "_partial_"} == wanted


@pytest.mark.parametrize("name", TASKS)
def test_task_yaml_carries_every_argument(name):
    section = lra.compose([f"task={name}"]).task
    wanted = set(inspect.signature(get_class(section._target_).__init__).parameters)
    assert set(constructor_arguments(section)) - {"_target_"} == wanted - {
        "self",
        "protocol",
        "data_root",
    }
    assert set(section.hparams) - {"pool"} == {
        "depth",
        "width",
        "state_size",
        "num_heads",
        "dropout",
        "batch_size",
        "steps",
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_task_is_named_and_has_a_vocabulary_of_its_own(name, protocol):
    task = build_task(lra.compose([f"task={name}", f"protocol={protocol}"]))
    assert task.name == name
    assert task.vocab is None or len(set(task.vocab)) == len(task.vocab)
    assert (
        build_task(lra.compose([f"task={name}", f"protocol={protocol}"])).fingerprint()
        == task.fingerprint()
    )


SMALL = "task.sizes={train: 40, val: 8, test: 8}"  # of tasks that are generated


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_packed_examples_fit_the_task(name, protocol, publishers):
    overrides = [
        f"task={name}",
        f"protocol={protocol}",
        f"data.root={publishers}",
        "data.allow_partial=true",
    ]
    if "sizes" in lra.compose(overrides).task:
        overrides.append(SMALL)
    cfg = lra.compose(overrides)
    task = build_task(cfg)
    try:
        store = prepare(task, **data_arguments(cfg))
    except DataError as error:
        if task.source == "generated" or name in KNOWN:
            raise
        pytest.skip(f"without its publisher's files: {error}")
    splits = store.splits
    assert tuple(splits) == SPLITS
    sizes = task.split_sizes()
    assert sizes is None or all(len(splits[name]) <= size for name, size in sizes.items())
    assert sizes is None or store.manifest["partial"] == any(
        len(splits[name]) < n for name, n in sizes.items()
    )
    for split in splits.values():
        check_rows(task, split)
    assert "majority" in store.manifest["reference"]
    assert all(0 <= accuracy <= 1 for accuracy in store.manifest["reference"].values())
    assert task.to_text(splits["test"].inputs[0, 0] if task.dual else splits["test"].inputs[0])
    decoded = task.decode(jnp.asarray(splits["test"].inputs[:2]))
    if task.num_tokens is None:
        assert decoded.dtype == jnp.float32
        assert decoded.shape == (2, task.seq_len, task.num_features)
    else:
        assert decoded.dtype == jnp.int32
        assert decoded.shape == splits["test"].inputs[:2].shape


def check_rows(task, split):
    inputs, lengths, labels = (np.asarray(x) for x in (split.inputs, split.lengths, split.labels))
    pair = (2,) if task.dual else ()
    features = (task.num_features,) if task.num_features > 1 else ()
    assert inputs.shape == (len(labels), *pair, task.seq_len, *features)
    assert lengths.shape == (len(labels), *pair)
    assert labels.shape[1:] == ((task.num_targets,) if task.num_targets > 1 else ())
    assert ((lengths >= 1) & (lengths <= task.seq_len)).all()
    assert (
        task.num_targets == 1 or (lengths == task.seq_len).all()
    )  # the targets are those of the last positions
    assert ((labels >= 0) & (labels < task.num_classes)).all()
    padding = np.arange(task.seq_len) >= lengths[..., None]
    assert (inputs[padding] == 0).all()
    if task.vocab is not None:
        assert (
            (inputs[~padding] >= 1) & (inputs[~padding] < len(task.vocab))
        ).all()  # 0 is padding
    factors = task.factors(split)
    assert all(
        values.shape == (len(labels),) and values.dtype.kind in "iuU" for values in factors.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_task_trains_two_steps(name, publishers, tmp_path, lra_command):
    """At its real length, from its own format, through the command."""
    overrides = [
        f"task={name}",
        "model=stu",
        "debug=tiny",
        "trainer.steps=2",
        "trainer.batch_size=2",
    ]
    overrides += [f"data.root={publishers}", "data.allow_partial=true", f"output.root={tmp_path}"]
    if "sizes" in lra.compose([f"task={name}"]).task:
        overrides.append(SMALL)
    done = lra_command("train", *overrides, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("**/record.json")
    record = json.loads(file.read_text())
    assert (record["status"], record["step"], record["task"]) == ("finished", 2, name)
    assert np.isfinite(record["metrics"]["test"]["loss"])
    assert (
        record["data"]["partial"]
        == ("partial data" in done.stdout)
        == ("sizes" not in record["config"]["task"])
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_its_model_builds(name):
    cfg = lra.compose([f"experiment={name}"])
    task = build_task(cfg)
    shapes = nnx.eval_shape(
        lambda: model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0)))
    )
    params = nnx.state(shapes, nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1000
    assign_groups(OmegaConf.to_container(cfg.optim), params)


@pytest.mark.parametrize("name", MODELS)
def test_unknown_argument_is_refused(name):
    with pytest.raises(ConfigError, match="unknown key model.frobnicate"):
        lra.compose([f"model={name}", "model.frobnicate=1"])


def causal_words(name, max_length):
    words = [f"model={name}", "task=listops_short", f"task.max_length={max_length}"]
    words += [
        "backbone.depth=1",
        "backbone.width=16",
        "backbone.pool=mean",
    ]  # a class token comes first and sees nothing
    section = lra.compose(words).model
    causal = {"bidirectional": "false", "causal": "true"}
    return [*words, *(f"model.{key}={value}" for key, value in causal.items() if key in section)]
