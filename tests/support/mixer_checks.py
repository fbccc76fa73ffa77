"""Checks that all kinds of mixers share, and the size of a network around a mixer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.backbone import Backbone


def check_streaming(mixer, u, atol=1e-5):
    """`step` gives the outputs of `__call__`; a scan refuses a state that changes its shape."""
    _, y = jax.lax.scan(mixer.step, mixer.init_state(len(u)), jnp.swapaxes(u, 0, 1))
    whole = mixer(u, jnp.ones(u.shape[:2], bool))
    np.testing.assert_allclose(jnp.swapaxes(y, 0, 1), whole, atol=atol)


def check_bfloat16(mixer, u, promotion="standard"):
    """16-bit inputs round the outputs once, and the state of a causal mixer stays wide."""
    u, mask = u.astype(jnp.bfloat16), jnp.ones(u.shape[:2], bool)
    with jax.numpy_dtype_promotion(promotion):
        y, exact = mixer(u, mask), mixer(u.astype(jnp.float32), mask)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
    check_bfloat16_step(mixer, u)


def check_bfloat16_step(mixer, u):
    """A step returns the dtype of its input, and its state stays float32 or complex64."""
    if mixer.causal and hasattr(mixer, "init_state"):
        state, y_t = mixer.step(mixer.init_state(len(u)), u[:, 0].astype(jnp.bfloat16))
        assert y_t.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(state)} <= {
            jnp.dtype(name) for name in ("float32", "complex64", "int32")
        }


def count_parameters(mixer, **options):
    """Parameters of a network around `mixer`, by default that of S4D."""
    defaults = {
        "num_classes": 35,
        "seq_len": 64,
        "vocab_size": None,
        "norm": "batch",
        "norm_position": "pre",
        "norm_momentum": 0.9,
        "final_norm": False,
        "activation": "gelu",
        "glu": "full",
        "mlp": "none",
        "mlp_ratio": 4,
        "dropout": 0.0,
        "pool": "mean",
        "positions": "none",
    }

    def build():
        return Backbone(mixer, **defaults | options, rngs=nnx.Rngs(params=jax.random.key(0)))

    return sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param)))
