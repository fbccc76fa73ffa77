"""What surrounds a mixer: pooling, norms, gates, positions, and pairs of sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.backbone import Backbone, Block, Norm, pool, sinusoids
from models.layers import Linear
from models.mixer import Mixer, MixerModule, StreamingMixer


class Shift(MixerModule):
    """A mixer without parameters: each position gets the one before it."""

    causal = True

    def __init__(self, width, seq_len, rngs):
        pass

    def __call__(self, x, mask, *, train, rngs):
        return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]


class Mean(Shift):
    """A mixer that looks ahead: each position gets the mean of the real ones."""

    causal = False

    def __call__(self, x, mask, *, train, rngs):
        return jnp.broadcast_to(pool(x, mask, "mean")[:, None], x.shape)


OPTIONS = {
    "num_classes": 5,
    "seq_len": 9,
    "vocab_size": 7,
    "depth": 2,
    "width": 4,
    "norm": "layer",
    "norm_position": "pre",
    "norm_momentum": 0.9,
    "final_norm": False,
    "activation": "gelu",
    "glu": "full",
    "mlp": "none",
    "mlp_ratio": 2,
    "dropout": 0.0,
    "pool": "mean",
    "positions": "none",
}


def backbone(mixer=Shift, **options):
    return Backbone(mixer, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(0)))


IDS = jnp.asarray(np.random.default_rng(0).integers(1, 7, (3, 9)), jnp.int32)
LENGTHS = jnp.asarray([9, 4, 1])


@pytest.mark.parametrize("option", [{}, {"final_norm": True}, {"pool": "cls", "mixer": Mean}])
def test_layers_lead_from_the_encoder_to_the_logits(option):
    model = backbone(**option, positions="learned")
    first, second, last = model.layers(IDS, LENGTHS)
    places = model.positions[...]
    encoded = model.encoder(IDS) + places[-9:]
    np.testing.assert_array_equal(first[:, -9:], encoded)  # after the class token, if any
    mask = jnp.arange(first.shape[1])[None] < LENGTHS[:, None] + (first.shape[1] - 9)
    for x, block, y in ((first, model.blocks[0], second), (second, model.blocks[1], last)):
        np.testing.assert_allclose(block(x, mask, train=False, rngs=None), y, rtol=1e-6)
    if model.final_norm is not None:
        last = model.final_norm(last, mask, train=False)
    pooled = pool(last, mask, model.pool)
    np.testing.assert_allclose(model.features(IDS, LENGTHS), pooled, rtol=1e-6)
    np.testing.assert_allclose(model(IDS, LENGTHS), model.head(pooled), rtol=1e-6)


def test_layers_of_pairs_keep_the_two_sequences_apart():
    model = backbone(num_pairs=2)
    pairs, lengths = jnp.stack([IDS, IDS[::-1]], axis=1), jnp.stack([LENGTHS, LENGTHS[::-1]], 1)
    found = model.layers(pairs, lengths)
    assert [x.shape for x in found] == [(3, 2, 9, 4)] * 3
    np.testing.assert_array_equal(found[-1][0, 0], found[-1][2, 1])


@pytest.mark.parametrize("option", [{"norm": n} for n in ("batch", "layer", "rms", "none")])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_every_norm_gives_logits(option, position):
    assert np.isfinite(backbone(**option, norm_position=position)(IDS, LENGTHS)).all()


@pytest.mark.parametrize(
    "option",
    [{"glu": g} for g in ("full", "half1", "half2", "none")]
    + [{"mlp": m} for m in ("gelu", "relu", "swiglu")],
)
def test_every_branch_changes_the_function(option):
    plain = backbone(glu="none", mlp="none")(IDS, LENGTHS)
    changed = backbone(**{"glu": "none"} | option)(IDS, LENGTHS)
    assert np.isfinite(changed).all()
    assert (option == {"glu": "none"}) == np.allclose(plain, changed)


def test_half_gates_are_those_of_s5():
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    for kind in ("half1", "half2"):
        glu = backbone(glu=kind).blocks[0].glu
        w, b = (np.asarray(v[...], np.float64) for v in (glu.linear.kernel, glu.linear.bias))
        y = np.asarray(jax.nn.gelu(x), np.float64)
        gate = 1 / (1 + np.exp(-(y @ w + b)))
        np.testing.assert_allclose(
            glu(x, jax.nn.gelu), (y if kind == "half1" else np.asarray(x)) * gate, atol=1e-5
        )


def test_pools_read_real_positions_only():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    mask = jnp.asarray([[True, True, True, False], [True, False, False, False]])
    np.testing.assert_allclose(pool(x, mask, "mean"), [[3, 4, 5], [12, 13, 14]])
    np.testing.assert_allclose(pool(x, mask, "last"), [[6, 7, 8], [12, 13, 14]])
    np.testing.assert_allclose(pool(x, mask, "cls"), [[0, 1, 2], [12, 13, 14]])


def test_class_token_sees_the_sequence_and_is_refused_where_it_cannot():
    model = backbone(Mean, pool="cls")
    other = IDS.at[0, 5].set(IDS[0, 5] % 6 + 1)
    assert np.abs(model(IDS, LENGTHS)[0] - model(other, LENGTHS)[0]).max() > 1e-6
    with pytest.raises(ValueError, match=r"backbone\.pool=cls"):
        backbone(Shift, pool="cls")


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_added_positions_tell_an_order_apart(positions):
    def swapped(model):
        return np.abs(model(IDS[:1], LENGTHS[:1]) - model(IDS[:1, ::-1], LENGTHS[:1])).max()

    assert swapped(backbone(Mean)) < 1e-5
    assert swapped(backbone(Mean, positions=positions)) > 1e-4


def test_sinusoids_are_vaswanis():
    table = sinusoids(50, 6)
    for t in (0, 1, 49):
        for i in (0, 1, 2):
            angle = t / 10_000 ** (2 * i / 6)
            np.testing.assert_allclose(
                table[t, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-12
            )
    with pytest.raises(ValueError, match=r"even backbone\.width"):
        sinusoids(5, 3)


def test_batch_norm_takes_statistics_over_real_positions():
    norm = Norm("batch", 4, 0.9, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 5, 4))
    mask = np.arange(5)[None] < np.asarray([5, 2])[:, None]
    real = x[mask]
    y = norm(jnp.asarray(x, jnp.float32), jnp.asarray(mask), train=True)
    expected = (x - real.mean(0)) / np.sqrt(real.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y)[mask], expected[mask], atol=1e-4)
    np.testing.assert_allclose(norm.norm.mean[...], 0.1 * real.mean(0), rtol=1e-4)


def test_dropout_acts_in_training_only_and_follows_its_key():
    model = backbone(dropout=0.5)

    def logits(seed):
        return model(IDS, LENGTHS, train=True, rngs=nnx.Rngs(dropout=seed))

    np.testing.assert_array_equal(model(IDS, LENGTHS), model(IDS, LENGTHS))
    np.testing.assert_array_equal(logits(0), logits(0))
    assert np.abs(logits(0) - logits(1)).max() > 1e-4


class Ones(Mean):
    def __call__(self, x, mask, *, train, rngs):
        return jnp.ones_like(x)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_without_a_glu_the_mixers_output_is_dropped_once(activation):
    """Half of it stays, and is doubled; twice would keep a quarter."""
    rest = {
        "norm_position": "pre",
        "norm_momentum": 0.9,
        "activation": activation,
        "mlp": "none",
        "mlp_ratio": 1,
    }
    block = Block(
        Ones(8, 1000, None), width=8, norm="none", glu="none", **rest, dropout=0.5, rngs=nnx.Rngs(0)
    )
    x = jnp.zeros((2, 1000, 8))
    y = block(x, jnp.ones((2, 1000), bool), train=True, rngs=nnx.Rngs(dropout=0))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert np.mean(y) == pytest.approx(1.0, abs=0.05)


def test_embeddings_are_dropped_in_training_alone():
    model, plain = backbone(embedding_dropout=0.5), backbone()
    np.testing.assert_array_equal(model(IDS, LENGTHS), plain(IDS, LENGTHS))
    trained = [model(IDS, LENGTHS, train=True, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(trained[0], trained[1])
    assert np.abs(trained[0] - trained[2]).max() > 1e-3


@pytest.mark.parametrize("num_targets", [1, 3])
def test_the_mlp_head_has_one_hidden_layer_with_relu(num_targets):
    model = backbone(head="mlp", mlp_ratio=3, num_targets=num_targets)
    lengths = jnp.full(len(IDS), 9)
    features = np.asarray(model.features(IDS, lengths, train=False, rngs=None), np.float64)
    hidden = np.maximum(features @ np.asarray(model.head.hidden.kernel[...]), 0)
    assert hidden.shape[-1] == 12
    expected = hidden @ np.asarray(model.head.output.kernel[...])
    np.testing.assert_allclose(model(IDS, lengths), expected, atol=1e-5)


def test_tied_dropout_has_one_mask_for_all_positions():
    """Also in the hidden layer of the MLP; another mask for each sequence and each branch."""
    block = backbone(tie_dropout=True, dropout=0.5).blocks[0]
    x = jnp.ones((3, 9, 4))
    y = block.dropout(x, deterministic=False, rngs=nnx.Rngs(dropout=0))
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1], y.shape))
    assert len(np.unique(y[:, 0], axis=0)) > 1
    free = backbone(dropout=0.5).blocks[0].dropout
    y = free(x, deterministic=False, rngs=nnx.Rngs(dropout=0))
    assert np.abs(y - y[:, :1]).max() > 0


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({"head": "mlp"}, jax.nn.relu),
        ({"head": "mlp", "head_activation": "gelu"}, jax.nn.gelu),
        ({"num_pairs": 2}, jax.nn.gelu),
        ({"num_pairs": 2, "head_activation": "relu"}, jax.nn.relu),
    ],
)
def test_hidden_layer_of_a_head_has_the_requested_activation(options, activation):
    head = backbone(**options).head
    x = jax.random.normal(jax.random.key(1), (3, head.hidden.in_features))
    np.testing.assert_allclose(head(x), head.output(activation(head.hidden(x))), atol=1e-6)


@pytest.mark.parametrize(("ratio", "hidden"), [(2, 8), (1, 4), (0.5, 2)])
def test_hidden_layer_of_a_pairs_head_has_the_requested_width(ratio, hidden):
    head = backbone(num_pairs=2, pair_head_ratio=ratio).head
    assert head.hidden.kernel.shape == (16, hidden)
    assert backbone(num_pairs=2).head.hidden.kernel.shape == (16, 8)


@pytest.mark.parametrize("vocab_size", [400, None])
def test_megas_initialization_is_that_of_its_code(vocab_size):
    sizes = {"width": 300, "vocab_size": vocab_size, "depth": 1}
    model = backbone(init="mega", mlp="silu", head="mlp", **sizes)

    def deviation(parameter):
        return float(np.asarray(parameter[...]).std())

    if vocab_size is None:
        assert deviation(model.encoder.kernel) == pytest.approx(1, rel=0.15)
        assert deviation(model.encoder.bias) == pytest.approx(0.1, rel=0.15)
    else:
        assert deviation(model.encoder.table) == pytest.approx(300**-0.5, rel=0.02)
    mlp, head = model.blocks[0].mlp, model.head
    for layer in (mlp.up, mlp.down):
        assert deviation(layer.kernel) == pytest.approx(0.02, rel=0.02)
        assert np.abs(layer.bias[...]).max() == 0
    for layer in (head.hidden, head.output):
        ends = (6 / sum(layer.kernel.shape)) ** 0.5  # of Glorot's uniform distribution
        assert 0.95 * ends < np.abs(layer.kernel[...]).max() <= ends


def test_zeros_are_hidden_from_the_mixers_only_if_asked():
    """`Mean` shows the positions that a mixer sees; the pool reads all real ones."""
    ids = IDS.at[0, 3].set(0)
    plain, masked = (backbone(Mean, mask_zeros=m, glu="none", depth=1) for m in (False, True))
    np.testing.assert_array_equal(plain(IDS, LENGTHS), masked(IDS, LENGTHS))
    assert np.abs(plain(ids, LENGTHS)[0] - masked(ids, LENGTHS)[0]).max() > 1e-4
    block = masked.blocks[0]
    x, mask = masked.encoder(ids), np.arange(9)[None] < np.asarray(LENGTHS)[:, None]
    y = block(x, jnp.asarray(mask & (np.asarray(ids) > 0)), train=False, rngs=None)
    expected = masked.head(pool(y, jnp.asarray(mask), "mean"))
    np.testing.assert_allclose(masked(ids, LENGTHS), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"backbone\.mask_zeros=true .*trainer\.precision"):
        backbone(mask_zeros=True, precision="bf16")


def test_pair_goes_through_one_encoder():
    model = backbone(num_pairs=2)
    pairs, lengths = (
        jnp.stack([IDS, IDS[::-1]], axis=1),
        jnp.stack([LENGTHS, LENGTHS[::-1]], axis=1),
    )
    logits = model(pairs, lengths)
    assert logits.shape == (3, 5)
    u, v = (
        np.asarray(model.features(pairs[:, i], lengths[:, i], train=False, rngs=None), np.float64)
        for i in (0, 1)
    )
    h = np.concatenate([u, v, u - v, u * v], axis=-1) @ np.asarray(model.head.hidden.kernel[...])
    out = np.asarray(jax.nn.gelu(h)) @ np.asarray(model.head.output.kernel[...])
    np.testing.assert_allclose(logits, out, atol=1e-5)


def test_head_of_a_pair_sees_what_the_option_says():
    """`concat` is the LRA paper's [u, v]: another function and fewer weights."""
    pairs, lengths = (
        jnp.stack([IDS, IDS[::-1]], axis=1),
        jnp.stack([LENGTHS, LENGTHS[::-1]], axis=1),
    )
    model = backbone(num_pairs=2, pair_head="concat")
    logits = model(pairs, lengths)
    u, v = (model.features(pairs[:, i], lengths[:, i], train=False, rngs=None) for i in (0, 1))
    assert model.head.hidden.kernel.shape == (2 * 4, 2 * 4)
    hidden = jax.nn.gelu(model.head.hidden(jnp.concatenate([u, v], axis=1)))
    np.testing.assert_allclose(logits, model.head.output(hidden), rtol=1e-5)
    with pytest.raises(ValueError, match="backbone.pair_head=sum is unknown"):
        backbone(num_pairs=2, pair_head="sum")


def test_last_positions_have_a_class_each():
    """Target t is read at position L - T + t, from that position's own features."""
    model = backbone(num_targets=3)
    lengths = jnp.full(len(IDS), 9)
    logits = model(IDS, lengths)
    assert logits.shape == (len(IDS), 3, 5)
    features = model.features(IDS, lengths, train=False, rngs=None)
    np.testing.assert_allclose(logits, model.head(features), rtol=1e-5)
    changed = model(IDS.at[:, -1].set((IDS[:, -1] + 1) % 7), lengths)  # the mixer is causal
    np.testing.assert_allclose(changed[:, :2], logits[:, :2], atol=1e-6)
    assert np.abs(changed[:, 2] - logits[:, 2]).max() > 1e-3


def test_values_go_through_a_linear_encoder():
    model = backbone(vocab_size=None, num_features=2)
    assert model(jnp.ones((3, 9, 2)), LENGTHS).shape == (3, 5)


def test_wrong_length_and_unknown_options_name_their_key():
    with pytest.raises(ValueError, match=r"task\.seq_len=9"):
        backbone()(IDS[:, :5], LENGTHS)
    keys = ("norm", "glu", "mlp", "pool", "positions", "activation", "norm_position", "head")
    for key in (*keys, "init"):
        with pytest.raises(ValueError, match=rf"backbone\.{key}=wrong is unknown; choose one of"):
            backbone(**{key: "wrong"})
    with pytest.raises(ValueError, match=r"backbone\.head_activation=wrong"):
        backbone(head="mlp", head_activation="wrong")


class NoMixer(nnx.Module):
    """Lacks the attributes of `Mixer`."""

    causal = True

    def __init__(self, width, seq_len, rngs):
        pass


def test_mixers_have_the_attributes_of_the_protocol():
    mixer = Shift(4, 9, None)
    assert isinstance(mixer, Mixer)
    assert not isinstance(mixer, StreamingMixer)
    assert (mixer.rotary, mixer.gates_residual, mixer.grows_with_length) == (False, False, False)
    with pytest.raises(ValueError, match="NoMixer has no attribute rotary, .*MixerModule"):
        backbone(NoMixer)


class Dense(MixerModule):
    """A mixer of one linear layer."""

    causal = True

    def __init__(self, width, seq_len, rngs):
        self.linear = Linear(width, width, rngs=rngs)

    def __call__(self, x, mask, *, train, rngs):
        self.dtypes = (x.dtype, self.linear(x).dtype)
        return self.linear(x)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", jnp.float32), ("bf16", jnp.bfloat16)])
def test_precision_sets_the_dtype_of_the_blocks(precision, dtype):
    model = backbone(Dense, precision=precision, mlp="gelu")
    assert model(IDS, LENGTHS).dtype == jnp.float32
    assert all(block.mixer.dtypes == (dtype, dtype) for block in model.blocks)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}


def test_linear_adds_its_bias_in_float32():
    """The gradient of the bias is a sum over positions, which bfloat16 would round."""
    layer = Linear(3, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jnp.ones((1, 1000, 3), jnp.bfloat16)
    grads = jax.grad(lambda p: nnx.merge(graph, p)(x).astype(jnp.float32).sum())(params)
    assert grads["bias"][...].dtype == jnp.float32
    np.testing.assert_array_equal(grads["bias"][...], [1000.0, 1000.0])
    x = jax.random.normal(jax.random.key(0), (4, 3))
    np.testing.assert_array_equal(layer(x), x @ layer.kernel[...] + layer.bias[...][None])
