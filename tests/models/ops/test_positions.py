"""Rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.positions import rotate


def test_products_depend_on_distances_only():
    rng = np.random.default_rng(0)
    q, k = (
        jnp.asarray(np.broadcast_to(rng.normal(size=8), (1, 20, 1, 8)), jnp.float32) for _ in "qk"
    )
    rotated_q, rotated_k = rotate(q)[0, :, 0], rotate(k)[0, :, 0]
    np.testing.assert_allclose(
        np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(q[0, 0, 0]), rtol=1e-5
    )
    np.testing.assert_allclose(
        rotated_q[3] @ rotated_k[1], rotated_q[12] @ rotated_k[10], rtol=1e-4
    )
    assert abs(float(rotated_q[3] @ rotated_k[1] - rotated_q[3] @ rotated_k[2])) > 1e-2


def test_positions_may_start_anywhere():
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    np.testing.assert_allclose(rotate(x[:, 3:], first=3), rotate(x)[:, 3:], atol=1e-6)
    np.testing.assert_allclose(rotate(x[:, 3:4], first=jnp.int32(3)), rotate(x)[:, 3:4], atol=1e-6)
