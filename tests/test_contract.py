"""The contract of every model and task in conf/, found there without an edit here."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from configured_task import configured_task
from flax import nnx
from hydra.utils import get_class

import lra
from lra.config.build import build_task, constructor_arguments, data_arguments, model_builder
from lra.config.cost import abstract_model, cost, parameters, state_size
from lra.config.options import options
from lra.data.store import pack, prepare
from lra.errors import ConfigError, DataError
from lra.runs.records import read_record
from lra.tasks.base import SPLITS
from lra.training.optimizer import assign_groups
from lra.training.setup import Setup
from lra.training.state import Examples, initial_state
from lra.training.step import make_step_functions
from models.mixer import MixerFactory, StreamingMixer

# one of each kind; the others are slow, and `pytest tests/test_contract.py -k NAME` runs any
KINDS = ("ar_stu", "lru", "transformer", "mega", "gru")
MODELS = [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in options("model")
]
TASKS, PROTOCOLS = options("task"), options("protocol")
WIDTH, DEPTH, BATCH = 16, 2, 3
TINY_TASK = ["task=listops_short", "task.max_length=30"]


# ---- models


class Built:
    """A small model of each kind, whose compiled functions all tests of the model share."""

    def __init__(self, name: str):
        self.name = name
        self.cfg = lra.compose(
            [f"model={name}", *TINY_TASK, f"backbone.depth={DEPTH}", f"backbone.width={WIDTH}"]
        )
        self.task = build_task(self.cfg)
        self.builder = model_builder(self.cfg, self.task)
        model = self.builder(rngs=nnx.Rngs(params=jax.random.key(0)))
        self.graph, self.initial, self.batch_stats, self.constants = nnx.split(
            model, nnx.Param, nnx.BatchStat, ...
        )
        self.params = perturbed(self.initial)
        self.mixer = model.blocks[0].mixer

        def loss(params, inputs, lengths, labels):
            logits = self.model(params)(inputs, lengths, train=True, rngs=nnx.Rngs(dropout=0))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), logits

        def mix(params, x, mask):
            mixer = self.model(params).blocks[0].mixer
            return mixer(x, mask, **{"residual": x} if mixer.gates_residual else {})

        self.forward = jax.jit(lambda *args: self.model(self.params)(*args))
        self.loss_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
        self.mix = lambda x, mask: mix_jitted(self.params, x, mask)
        mix_jitted = jax.jit(mix)

    def model(self, params):
        return nnx.merge(self.graph, params, self.batch_stats, self.constants, copy=True)

    def batch(self, seed=0, batch=BATCH):
        """Random ids, zero at padding, and lengths."""
        rng = np.random.default_rng(seed)
        inputs = rng.integers(3, len(self.task.vocab), (batch, self.task.seq_len))
        lengths = rng.integers(5, self.task.seq_len - 5, batch)
        inputs[np.arange(self.task.seq_len) >= lengths[:, None]] = 0
        return jnp.asarray(inputs, jnp.int32), jnp.asarray(lengths, jnp.int32)

    def padding_replaced(self, inputs, lengths):
        other = jnp.where(np.arange(self.task.seq_len) >= np.asarray(lengths)[:, None], 7, inputs)
        assert (other != inputs).any()
        return other

    def sequences(self, dtype=jnp.float32):
        """Inputs (2, L, D) of a mixer, and masks of a whole and of a padded pair."""
        length = self.task.seq_len
        x = jax.random.normal(jax.random.key(1), (2, length, WIDTH)).astype(dtype)
        padded = jnp.arange(length)[None, :] < jnp.asarray([length, 20])[:, None]
        return x, jnp.ones(x.shape[:2], bool), padded


def perturbed(params):
    """`params` plus noise, because some papers start parameters at zero."""
    keys = nnx.Rngs(noise=1)
    return jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(keys.noise(), x.shape, x.dtype), params
    )


@pytest.fixture(scope="module", params=MODELS)
def built(request):
    return Built(request.param)


def test_logits_have_shape_and_dtype(built):
    logits = built.forward(*built.batch())
    assert logits.shape == (BATCH, built.task.num_classes)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


def test_every_parameter_has_a_finite_gradient_that_is_not_zero(built):
    _, grads = built.loss_and_gradients(built.params, *built.batch(), jnp.arange(BATCH))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert np.abs(grad).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


@pytest.mark.slow
def test_small_model_overfits_one_batch(built):
    """In 60 steps of Adam the training loss falls below 10 % of its first value."""
    tx, params = optax.adam(1e-2), built.initial
    opt, losses = tx.init(params), []

    @jax.jit
    def update(grads, opt, params):
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    for _ in range(60):
        (loss, _), grads = built.loss_and_gradients(params, *built.batch(), jnp.arange(BATCH))
        params, opt = update(grads, opt, params)
        losses.append(float(loss))
    assert losses[0] > 1
    assert losses[-1] < 0.1 * losses[0]


def test_padding_changes_nothing(built):
    inputs, lengths = built.batch()
    other = built.padding_replaced(inputs, lengths)
    np.testing.assert_allclose(
        built.forward(inputs, lengths), built.forward(other, lengths), atol=1e-5
    )


def test_padding_changes_no_training_step(built):
    """Batch statistics cover real positions only."""
    inputs, lengths = built.batch()
    (_, logits), (_, other) = (
        built.loss_and_gradients(built.params, x, lengths, jnp.arange(BATCH))[0]
        for x in (inputs, built.padding_replaced(inputs, lengths))
    )
    np.testing.assert_allclose(logits, other, atol=1e-5)


def test_causal_mixers_ignore_the_future_and_others_do_not(built):
    x, mask, _ = built.sequences()
    if built.mixer.causal:
        cut = built.task.seq_len // 2
        before, after = built.mix(x, mask), built.mix(x.at[:, cut:].add(1.0), mask)
        np.testing.assert_allclose(before[:, :cut], after[:, :cut], atol=1e-5)
        assert np.abs(before[:, cut:] - after[:, cut:]).max() > 1e-3
    else:
        before, after = built.mix(x, mask), built.mix(x.at[:, -1].add(10.0), mask)
        assert np.abs(before[:, 0] - after[:, 0]).max() > 1e-5


def test_examples_of_a_batch_are_independent(built):
    inputs, lengths = built.batch()
    others, other_lengths = built.batch(seed=1)
    logits = built.forward(inputs, lengths)
    for i in range(BATCH):
        among_others = built.forward(
            others.at[i].set(inputs[i]), other_lengths.at[i].set(lengths[i])
        )
        np.testing.assert_allclose(among_others[i], logits[i], atol=1e-5)
        assert np.abs(among_others - logits).max() > 1e-3
    np.testing.assert_allclose(built.forward(inputs[::-1], lengths[::-1]), logits[::-1], atol=1e-5)


def test_same_seed_same_parameters(built):
    def params(seed):
        return nnx.state(built.builder(rngs=nnx.Rngs(params=jax.random.key(seed))), nnx.Param)

    equal = jax.tree.map(np.array_equal, built.initial, params(0))
    assert all(jax.tree.leaves(equal))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, built.initial, params(1))))


def test_inputs_longer_than_the_model_are_refused(built):
    inputs, lengths = built.batch()
    with pytest.raises(ValueError, match=r"built for task\.seq_len="):
        jax.eval_shape(built.model(built.params), jnp.pad(inputs, ((0, 0), (0, 1))), lengths)


def test_training_step_returns_what_it_takes(built):
    """Shapes, dtypes and weak types are stable, so that the second call does not compile again."""
    setup = Setup(built.cfg)
    state = initial_state(setup)[0]
    inputs, lengths = built.batch(batch=8)
    data = Examples(inputs.astype(jnp.uint8), lengths, jnp.zeros(8, jnp.int32))
    after = jax.eval_shape(
        make_step_functions(setup, 4).train_steps, state, setup.constants, data, jnp.int32(2)
    )
    found, expected = (jax.tree.map(jax.typeof, tree) for tree in (after, state))
    assert found == expected


def test_parameter_count_grows_with_length_only_if_declared(built):
    def count(length):
        words = [f"model={built.name}", "task=listops_short", f"backbone.width={WIDTH}"]
        cfg = lra.compose([*words, f"task.max_length={length}"])
        return parameters(abstract_model(cfg, build_task(cfg)))

    assert (count(30) != count(60)) == built.mixer.grows_with_length


def test_reported_parameters_are_those_that_train(built):
    found = cost(built.cfg)
    assert found.params == sum(x.size for x in jax.tree.leaves(built.params))
    assert (found.width, found.depth) == (WIDTH, DEPTH)
    assert found.note == ""
    assert found.flops > 2 * built.task.seq_len * WIDTH * WIDTH


@pytest.mark.slow
def test_bfloat16_is_near_float32(built):
    """Sums and states of a mixer stay float32; activations and factors of products are rounded."""
    x, _, padded = built.sequences(jnp.bfloat16)
    exact, y = built.mix(x.astype(jnp.float32), padded), built.mix(x, padded)
    assert y.dtype == jnp.bfloat16
    real = np.asarray(padded)
    # each rounding to 8 bits loses 0.4 %; the mixers lose 0.2 to 1.2 % of the largest output
    np.testing.assert_allclose(
        y.astype(jnp.float32)[real], exact[real], rtol=0, atol=0.03 * np.abs(exact).max()
    )


def test_padding_changes_nothing_in_bfloat16(built):
    """Not even by rounding errors of transforms that mix all positions."""
    x, _, padded = built.sequences(jnp.bfloat16)
    y, other = built.mix(x, padded), built.mix(jnp.where(padded[..., None], x, 100 * x), padded)
    real = np.asarray(padded)
    np.testing.assert_array_equal(y.astype(jnp.float32)[real], other.astype(jnp.float32)[real])


def test_groups_of_the_recipe_have_parameters_in_every_layer(built):
    groups = {group.name: group for group in assign_groups(built.cfg.optim, built.params)[0]}
    for name, rule in (built.cfg.optim.groups or {}).items():
        assert (groups[name].lr_factor, groups[name].weight_decay) == (
            rule.lr_factor,
            rule.weight_decay,
        )
        layers = {
            int(path.split("/")[1]) for path in groups[name].paths if path.startswith("blocks/")
        }
        assert layers in (set(), set(range(DEPTH))), groups[name].paths


@pytest.mark.parametrize("name", MODELS)
def test_streaming_equals_parallel(name):
    """With the option that makes the mixer causal, over more than one of Mega's chunks."""
    cfg = lra.compose(causal_words(name, 150))
    task = build_task(cfg)
    model = model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0)))
    if not isinstance(model.blocks[0].mixer, StreamingMixer):
        pytest.skip("no recurrent form")
    graph, params, rest = nnx.split(model.blocks[0].mixer, nnx.Param, ...)
    params = perturbed(params)

    @jax.jit
    def both(x):
        mixer = nnx.merge(graph, params, rest)
        extra = {"residual": x} if mixer.gates_residual else {}
        parallel = mixer(x, jnp.ones(x.shape[:2], bool), **extra)
        # the scan refuses a state that changes its shape
        _, streamed = jax.lax.scan(mixer.step, mixer.init_state(2), x.swapaxes(0, 1))
        return parallel, streamed.swapaxes(0, 1)

    parallel, streamed = both(jax.random.normal(jax.random.key(1), (2, task.seq_len, WIDTH)))
    np.testing.assert_allclose(streamed, parallel, rtol=0, atol=2e-5 * np.abs(parallel).max())


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_state_does_not_grow_with_length(name):
    def size(max_length):
        cfg = lra.compose(causal_words(name, max_length))
        return state_size(abstract_model(cfg, build_task(cfg)))

    if (short := size(1000)) is None:
        pytest.skip("no recurrent form")
    # the recurrence of the STU's filters reaches its largest size, 2 K, here
    assert size(2000) <= 1.1 * short


@pytest.mark.parametrize("name", MODELS)
def test_mixers_that_read_the_future_have_no_recurrent_form(name):
    section = lra.compose([f"model={name}"]).model
    ahead = {"bidirectional": "true", "causal": "false"}
    words = [f"model.{key}={value}" for key, value in ahead.items() if key in section]
    cfg = lra.compose([f"model={name}", *TINY_TASK, f"backbone.width={WIDTH}", *words])
    mixer = abstract_model(cfg, build_task(cfg)).blocks[0].mixer
    if not words or not isinstance(mixer, StreamingMixer):
        pytest.skip("no recurrent form, or no such option")
    assert not mixer.causal
    with pytest.raises(ValueError, match=re.escape(words[0])):
        mixer.init_state(1)


def causal_words(name, max_length):
    """Overrides of a one-layer model, made causal if it has such an option."""
    words = [f"model={name}", "task=listops_short", f"task.max_length={max_length}"]
    # a class token comes first, where a causal mixer reads no other position
    words += ["backbone.depth=1", f"backbone.width={WIDTH}", "backbone.pool=mean"]
    section = lra.compose(words).model
    causal = {"bidirectional": "false", "causal": "true"}
    return [*words, *(f"model.{key}={value}" for key, value in causal.items() if key in section)]


@pytest.mark.parametrize("name", MODELS)
def test_model_yaml_has_every_argument(name):
    """A misspelt override is refused, and every default is written in one place."""
    section = lra.compose([f"model={name}"]).model
    wanted = parameter_names(get_class(section._target_).__init__)
    wanted -= parameter_names(MixerFactory.__call__)
    assert set(constructor_arguments(section)) - {"_target_", "_partial_"} == wanted


@pytest.mark.parametrize("name", MODELS)
def test_unknown_argument_is_refused(name):
    with pytest.raises(ConfigError, match="unknown key model.frobnicate"):
        lra.compose([f"model={name}", "model.frobnicate=1"])


# ---- tasks


def parameter_names(function):
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", TASKS)
def test_task_yaml_has_every_argument(name):
    """All arguments that the harness does not supply, and the sizes that conf/ refers to."""
    section = lra.compose([f"task={name}"]).task
    supplied = {"self", "protocol", "data_root"}
    wanted = parameter_names(get_class(section._target_).__init__)
    assert supplied <= wanted
    assert set(constructor_arguments(section)) - {"_target_"} == wanted - supplied
    conf = Path(lra.__file__).parents[1] / "conf"
    used = re.findall(
        r"\$\{task\.hparams\.(\w+)\}", "".join(f.read_text() for f in conf.glob("*/*.yaml"))
    )
    assert len(used) > 4
    assert set(used) <= set(section.hparams)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_task_has_its_name_and_distinct_tokens(name, protocol):
    task = build_task(lra.compose([f"task={name}", f"protocol={protocol}"]))
    assert task.name == name
    assert task.vocab is None or len(set(task.vocab)) == len(task.vocab)
    assert task.classes is None or len(task.classes) == task.num_classes


def small_task(name, publishers, *overrides):
    """Overrides of a task with few examples, generated or in the format of its publisher."""
    words = [f"task={name}", f"data.root={publishers}", "data.allow_partial=true", *overrides]
    generated = "sizes" in lra.compose(words).task
    return [*words, *(["task.sizes={train: 40, val: 8, test: 8}"] if generated else [])]


def skip_without_files(task):
    """Skips a task if the tests have no files in its publisher's format."""
    try:
        task.source_files()
    except DataError as error:
        pytest.skip(f"needs the publisher's files: {error}")


@pytest.mark.parametrize("protocol", ["s4", "lra2020"])
@pytest.mark.parametrize("name", TASKS)
def test_text_or_picture_is_encoded_as_the_example_is_stored(name, protocol, publishers):
    task = configured_task(name, protocol, publishers)
    skip_without_files(task)
    examples = list(task.first_examples("train", 2))

    def own(sequence):
        if task.picture_shape is None:
            return task.to_text(sequence)
        return sequence.reshape(*task.picture_shape, *sequence.shape[1:])

    sides = [e.inputs if task.dual else (e.inputs,) for e in examples]
    owned = [tuple(map(own, side)) for side in sides]
    inputs, lengths = task.encode(*(owned if task.dual else [side[0] for side in owned]))
    packed = pack(task, examples)
    np.testing.assert_array_equal(inputs, task.decode(jnp.asarray(packed.inputs)))
    np.testing.assert_array_equal(lengths, packed.lengths)


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("copy", "0 1 x", "unknown token 'x'; expected some of . [?] 0 1"),
        ("copy", "0 1", "a sequence of length 2; expected 64 to 64"),
        ("listops", "[MAX 2 9", "listops: .*; expected .MAX 2 9"),
        ("listops", "[MAX 2 1x ]", "unknown token '1x'"),
        ("listops", "", "listops: "),
        ("listops_short", "[MAX " + "1 " * 200 + "]", "length 203; expected 1 to 136"),
        ("retrieval", "one document", "expected a tuple of two sequences"),
        ("image", np.zeros((32, 32)), r"found an array \(32, 32\) of float64"),
        ("scifar", np.zeros((32, 32), int), r"expected \(32, 32, 3\) of whole numbers"),
        ("pathfinder", np.full((32, 32), 256), "from 0 to 255"),
    ],
)
def test_own_example_of_another_form_is_refused(name, example, message):
    with pytest.raises(DataError, match=message) as caught:
        configured_task(name).encode(example)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_packed_examples_fit_the_task(name, protocol, publishers):
    cfg = lra.compose(small_task(name, publishers, f"protocol={protocol}"))
    task = build_task(cfg)
    skip_without_files(task)
    store = prepare(task, **data_arguments(cfg))
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
    # several targets are those of the last positions, which must be real
    assert task.num_targets == 1 or (lengths == task.seq_len).all()
    assert ((labels >= 0) & (labels < task.num_classes)).all()
    padding = np.arange(task.seq_len) >= lengths[..., None]
    assert (inputs[padding] == 0).all()
    if task.vocab is not None:  # 0 is padding
        assert ((inputs[~padding] >= 1) & (inputs[~padding] < len(task.vocab))).all()
    factors = task.factors(split)
    assert all(
        values.shape == (len(labels),) and values.dtype.kind in "iuU" for values in factors.values()
    )


MAX_TRAINED_LENGTH = (
    4096  # the longest tasks only trace their steps: two steps of 65,536 tokens take minutes
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_task_trains_two_steps(name, publishers, tmp_path):
    """At its real length, from its own format."""
    overrides = small_task(name, publishers, f"output.root={tmp_path}", "model=lru", "debug=tiny")
    overrides += ["trainer.steps=2", "trainer.batch_size=2"]
    cfg = lra.compose(overrides)
    task = build_task(cfg)
    skip_without_files(task)
    if task.seq_len > MAX_TRAINED_LENGTH:
        trace_two_steps(cfg)
        return
    lra.train(overrides)
    (file,) = tmp_path.glob("**/record.json")
    record = read_record(file.parent)
    assert (record["status"], record["step"], record["task"]) == ("finished", 2, name)
    assert np.isfinite(record["metrics"]["test"]["loss"])
    assert record["data"]["partial"] == ("sizes" not in record["config"]["task"])


def trace_two_steps(cfg):
    """Traces the training and the evaluation of the task's packed examples."""
    setup = Setup(cfg)
    split = prepare(setup.task, **data_arguments(cfg)).splits["train"]
    data = Examples(
        *(jnp.asarray(np.asarray(x)) for x in (split.inputs, split.lengths, split.labels))
    )
    step_fns, state = make_step_functions(setup, 2), initial_state(setup)[0]
    after = jax.eval_shape(step_fns.train_steps, state, setup.constants, data, jnp.int32(2))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    logits = jax.eval_shape(
        step_fns.predict,
        state.params,
        state.batch_stats,
        setup.constants,
        data.inputs[:2],
        data.lengths[:2],
    )
    targets = (setup.task.num_targets,) if setup.task.num_targets > 1 else ()
    assert logits.shape == (2, *targets, setup.task.num_classes)
