"""The LRU and every step of its paper's ablation against float64 loops."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from mixer_checks import check_bfloat16, check_streaming

import lra
from lra.config.build import build_task, model_builder
from lra.training.optimizer import assign_groups
from models.lru import LRU

PAGE = Path(__file__).parents[2] / "docs" / "models" / "lru.md"
RUNGS = {
    name.strip(): shlex.split(command)[2:]
    for command, name in re.findall(r"^(lra train .*) # (.*)$", PAGE.read_text(), flags=re.M)
}
DENSE = {"parametrization": "dense", "gamma_norm": False}
VARIANTS = {
    "tanh": DENSE | {"activation": "tanh"},
    "relu": DENSE | {"activation": "relu"},
    "dense": DENSE,
    "real_imag": {"parametrization": "real_imag", "gamma_norm": False},
    "exp": {"parametrization": "exp", "gamma_norm": False},
    "stable_exp": {"phase": "linear", "gamma_norm": False},
    "lru": {},
}
OPTIONS = {
    "state_size": 5,
    "parametrization": "stable_exp",
    "phase": "log",
    "activation": "none",
    "r_min": 0.3,
    "r_max": 0.9,
    "max_phase": 6.28,
    "gamma_norm": True,
    "bidirectional": False,
}


def lru(seed=0, **options):
    return LRU(3, 0, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(seed)))


def inputs(length=17):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, length, 3)), jnp.float32)


def by_loop(p, u, real, variant, both):
    """Equations (1) and (7) in complex128, one step at a time, in one or two directions."""
    f = {"tanh": np.tanh, "relu": lambda x: np.where(x > 0, x, 0.0)}.get(variant, lambda x: x)
    if "a" in p:
        b, c = p["b"], p["c"]
        n = len(p["a"])
    else:
        b, c = p["b_re"] + 1j * p["b_im"], p["c_re"] + 1j * p["c_im"]
        n = b.shape[1]
        lam = {
            "real_imag": lambda: p["lam_re"] + 1j * p["lam_im"],
            "exp": lambda: np.exp(-p["nu"] + 1j * p["theta"]),
            "stable_exp": lambda: np.exp(-np.exp(p["nu_log"]) + 1j * p["theta"]),
            "lru": lambda: np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"])),
        }[variant]()

    def run(order, c):
        h, y = np.zeros((len(u), n), b.dtype), [None] * u.shape[1]
        for t in order:
            bu = (u[:, t] * (1.0 if c is first else real[:, t, None])) @ b
            if "gamma_log" in p:
                bu = np.exp(p["gamma_log"]) * bu
            h = f(h @ p["a"] + bu) if "a" in p else lam * h + bu
            y[t] = (h @ c).real
        return np.stack(y, axis=1)

    first, second = c[:n], c[n:]
    y = run(range(u.shape[1]), first) + p["d"] * u
    return y + run(reversed(range(u.shape[1])), second) if both else y


@pytest.mark.fast_variants(6)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_a_loop_in_float64(variant, both):
    mixer = lru(**VARIANTS[variant], bidirectional=both)
    real = np.arange(11)[None] < np.array([[11], [6]])
    check_mixer_against_loop(
        mixer, inputs(11), real, lambda p, u: by_loop(p, u, real, variant, both)
    )


def test_all_parametrizations_start_at_the_same_eigenvalues():
    names = ("real_imag", "exp", "stable_exp", "lru")
    lams = [lru(**VARIANTS[name] | {"gamma_norm": False}, r_max=1).eigenvalues() for name in names]
    for lam in lams[:3]:
        np.testing.assert_allclose(lam, lams[3], rtol=2e-6)


def test_eigenvalues_are_uniform_in_the_area_of_the_ring():
    mixer = lru(state_size=4000, r_min=0.6, r_max=0.8, max_phase=0.3)
    radius, phase = np.abs(mixer.eigenvalues()), np.angle(mixer.eigenvalues())
    assert 0.6 <= radius.min() < 0.603
    assert 0.797 < radius.max() <= 0.8
    assert 0.297 < phase.max() <= 0.3
    assert np.mean(radius**2) == pytest.approx((0.6**2 + 0.8**2) / 2, abs=0.005)
    np.testing.assert_allclose(np.exp(mixer.gamma_log[...]), np.sqrt(1 - radius**2), rtol=1e-4)


def test_without_a_ring_eigenvalues_fill_the_disk_as_a_glorot_matrix_does():
    """The mean of |lam|^2 is 1/2, and a quarter of all states are within half the radius."""
    drawn = np.concatenate(
        [lru(s, state_size=300, r_min=0, r_max=1).eigenvalues() for s in range(5)]
    )
    dense = np.concatenate(
        [np.linalg.eigvals(lru(s, **DENSE, state_size=300).a[...]) for s in range(5)]
    )
    for lam in (drawn, dense):
        assert np.mean(np.abs(lam) ** 2) == pytest.approx(0.5, abs=0.02)
        assert np.mean(np.abs(lam) < 0.5) == pytest.approx(0.25, abs=0.03)
        assert np.abs(lam).max() < 1.1


def test_the_page_has_all_rungs():
    assert list(RUNGS) == [
        "RNN-ReLU",
        "RNN-tanh",
        "Dense A",
        "Lambda Real + Im",
        "Lambda Exp",
        "Lambda Stable Exp",
        "+ Ring Init",
        "+ gamma = LRU",
    ]


@pytest.mark.parametrize(
    ("rung", "variant"), [*zip(RUNGS, ("relu", "tanh", *list(VARIANTS)[2:6]), strict=False)]
)
def test_a_rung_of_the_page_is_the_variant_held_to_a_loop(rung, variant):
    model = lra.compose(RUNGS[rung]).model
    wanted = OPTIONS | VARIANTS[variant]
    for key in ("parametrization", "activation", "gamma_norm"):
        assert model[key] == wanted[key]
    assert model.phase == wanted["phase"] or model.parametrization != "stable_exp"
    assert (model.r_min, model.r_max) == (0, 1) or model.parametrization == "dense"


@pytest.mark.slow
@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_composes_and_trains_every_parameter(rung):
    small = [
        "task=listops_short",
        "task.max_length=30",
        "backbone.depth=1",
        "backbone.width=16",
        "model.state_size=8",
    ]
    cfg = lra.compose([word for word in RUNGS[rung] if not word.startswith("task=")] + small)
    task = build_task(cfg)
    graph, params, rest = nnx.split(
        model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0))), nnx.Param, ...
    )
    ids = jax.random.randint(jax.random.key(1), (3, task.seq_len), 1, len(task.vocab))

    @jax.jit
    @jax.grad
    def slope(params):
        logits = nnx.merge(graph, params, rest, copy=True)(
            ids, jnp.array([30, 20, 9]), train=True, rngs=nnx.Rngs(dropout=0)
        )
        return (jax.nn.log_softmax(logits)[:, 0] ** 2).mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(slope(params)):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)
    recurrent = {
        name.split("/")[-1]
        for group in assign_groups(cfg.optim, params)[0]
        if group.name == "recurrent"
        for name in group.paths
    }
    mixer = {
        path[0]
        for path, _ in nnx.to_flat_state(nnx.state(nnx.merge(graph, params, rest).blocks[0].mixer))
    }
    assert recurrent == mixer - {"c", "c_re", "c_im", "d"}  # the paper: A, B and gamma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"parametrization": "polar"},
            r"model\.parametrization=polar is unknown; choose one of dense",
        ),
        ({"phase": "square"}, r"model\.phase=square is unknown"),
        (DENSE | {"activation": "gelu"}, r"model\.activation=gelu is unknown"),
        ({"activation": "tanh"}, r"model\.activation=tanh requires model\.parametrization=dense"),
        (DENSE | {"gamma_norm": True}, r"model\.gamma_norm=true needs eigenvalues"),
        ({"state_size": 0}, r"model\.state_size=0"),
        ({"max_phase": 0}, r"model\.max_phase=0"),
        ({"r_min": 0.95}, r"model\.r_min=0\.95"),
        ({"r_min": -0.1}, r"model\.r_min=-0\.1"),
        ({"r_max": 1.1}, r"model\.r_max=1\.1"),
    ],
)
def test_bad_options_name_their_key(options, message):
    with pytest.raises(ValueError, match=message):
        lru(**options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_equals_the_whole_sequence(variant):
    check_streaming(lru(**VARIANTS[variant]), inputs(60), atol=2e-5)


@pytest.mark.fast_variants(6)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bits_are_rounded_once_and_states_stay_wide(variant, both):
    mixer = lru(**VARIANTS[variant], bidirectional=both)
    check_bfloat16(mixer, inputs(300), promotion="strict")  # nothing is widened by chance
