"""STU-T, the tensorized Spectral Transform Unit.

Each matrix M_k of the STU factors into one matrix for all k and one number per output channel,

    M_k[i, o] = m_in[i, o] m_filters[k, o]

so that the input is multiplied once and each channel is convolved with one filter.

Paper: "Flash STU: Fast Spectral Transform Units" (arXiv 2409.10489). Reference code read:
windsornguyen/flash-stu with `use_approx`. As there, U- shares the matrices of U+, and the direct
taps M_u, the feedback from y and its lag of 2 are absent. Deviations: docs/models/stu.md.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import require_causal
from models.mixer import Mask, MixerModule, Sequences
from models.ops.fft_convolution import fft_convolution
from models.ops.filter_step import initial_features, next_features
from models.stu import State, apply_reversed, filter_variables


class TensorizedSTU(MixerModule):
    """One matrix product, then one spectral filter per channel; causal unless bidirectional.

    y_t = sum_k sigma_k^(1/4) m_filters[k] * (X+_{t,k} + X-_{t,k}), where X are the features U of
    x_t = u_t m_in.

    Args:
        seq_len, num_filters, filters, bidirectional: as in `STU`.
        negative_filters: adds the features X- with signs (-1)^i; hankel only.
    Raises:
        ValueError: K > L, or an option that is unknown or does not fit.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_filters: int,
        filters: str,
        negative_filters: bool,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        self.bank = (filters, seq_len, num_filters)
        self.causal, self.negative_filters = not bidirectional, negative_filters
        self.sigma, self.phi = filter_variables(filters, seq_len, num_filters, negative_filters)
        # If one factor were zero initially, the other would have no gradient.
        xavier = jax.nn.initializers.glorot_normal()
        self.m_in = nnx.Param(xavier(rngs.params(), (width, width)))
        self.m_filters = nnx.Param(xavier(rngs.params(), (num_filters, width)))
        self.anticausal = (
            TensorizedSTU(
                width,
                seq_len,
                num_filters=num_filters,
                filters=filters,
                negative_filters=negative_filters,
                bidirectional=False,
                rngs=rngs,
            )
            if bidirectional
            else None
        )

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        length = x.shape[1]
        # rounding errors of the transforms are not causal: padding would change them
        x = jnp.where(mask[..., None], x, 0)
        filters = self.phi[...][:length] @ self.scales()  # (L, D)
        if self.negative_filters:  # phi(i) + (-1)^i phi(i)
            filters = filters * (2.0 * (jnp.arange(length) % 2 == 0)).astype(filters.dtype)[:, None]
        dtype = jnp.promote_types(x.dtype, jnp.float32)  # of the transforms
        u = (x @ self.m_in[...].astype(x.dtype)).astype(dtype)
        y = fft_convolution(u, filters.astype(dtype).T).astype(x.dtype)
        return y if self.anticausal is None else y + apply_reversed(self.anticausal, x, mask)

    def scales(self) -> Float[Array, "K D"]:
        """sigma_k^(1/4) m_filters[k], at least in float32."""
        sigma = self.sigma[...]
        return (sigma**0.25)[:, None] * self.m_filters[...].astype(sigma.dtype)

    def init_state(self, batch_size: int) -> State:
        """Zeros, of a size that depends on K and D, not on L."""
        require_causal(self.causal)
        width = self.m_in.shape[0]
        features = initial_features(batch_size, width, *self.bank)
        return {"plus": features} | ({"minus": features} if self.negative_filters else {})

    def step(self, state: State, u_t: Float[Array, "B D"]) -> tuple[State, Float[Array, "B D"]]:
        """One position of `__call__`, with the limits of `STU.step`."""
        x_t = (u_t @ self.m_in[...].astype(u_t.dtype)).astype(state["plus"].dtype)
        new = {"plus": next_features(state["plus"], x_t, *self.bank)}
        features = new["plus"]
        if self.negative_filters:
            new["minus"] = next_features(state["minus"], x_t, *self.bank, alternate=True)
            features = features + new["minus"]
        scales = self.scales()[: features.shape[1]].astype(features.dtype)
        return new, jnp.sum(features[:, : len(scales)] * scales[None], axis=1).astype(u_t.dtype)
