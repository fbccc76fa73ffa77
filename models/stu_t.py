"""STU-T, the tensorised Spectral Transform Unit of "Flash STU: Fast Spectral Transform Units" (arXiv 2409.10489).

Each matrix M_k of the STU is one matrix, the same for all k, times one number per output channel:
M_k[i, o] = m_in[i, o] m_filters[k, o]. So the input is multiplied once and each channel convolved with one filter of its own.
Reference code read: windsornguyen/flash-stu with `use_approx`. As there, U- shares the matrices of U+, and neither the direct
taps M_u nor the feedback from y of the STU paper are left, nor its lag of 2, which belongs to the feedback.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.checks import refuse_to_stream
from models.ops.fft_convolution import fft_convolution
from models.ops.filter_step import initial_features, next_features
from models.stu import State, fixed_filters, from_the_end


class TensorizedSTU(nnx.Module):
    """One matrix product, then spectral filters channel by channel; causal unless bidirectional.

    y_t = sum_k sigma_k^(1/4) m_filters[k] * (X+_{t,k} + X-_{t,k}), where X are the features U of x_t = u_t m_in.

    Args:
        width: D, of input and output.
        seq_len: L, the length the filters are made for.
        num_filters: K, largest eigenpairs of the matrix of `filters`.
        filters: hankel | alternative, section 2 or appendix D of the STU paper.
        negative_filters: also the features X- with signs (-1)^i; hankel only.
        bidirectional: a second unit with matrices of its own reads the sequence from its end; the outputs are added.
    Raises:
        ValueError: K > L, or an option that is unknown or does not fit; the message names the config key.
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
        self.seq_len, self.num_filters, self.filters = seq_len, num_filters, filters
        self.causal, self.negative_filters = not bidirectional, negative_filters
        self.sigma, self.phi = fixed_filters(filters, seq_len, num_filters, negative_filters)
        # Neither factor may start at zero: the other would have no gradient.
        xavier = jax.nn.initializers.glorot_normal()
        self.m_in = nnx.Param(xavier(rngs.params(), (width, width)))
        self.m_filters = nnx.Param(xavier(rngs.params(), (num_filters, width)))
        self.backward = (
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
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        *,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B L D"]:
        length = x.shape[1]
        if length > self.seq_len:
            raise ValueError(
                f"the filters have length {self.seq_len} and the input {length}; set task.seq_len to {length} or more"
            )
        x = jnp.where(
            mask[..., None], x, 0
        )  # rounding in the transforms is not causal: padding would be seen in it
        filters = self.phi[...][:length] @ self.scales()  # (L, D)
        if self.negative_filters:
            # phi(i) + (-1)^i phi(i)
            filters = filters * (2.0 * (jnp.arange(length) % 2 == 0)).astype(filters.dtype)[:, None]
        dtype = jnp.promote_types(x.dtype, jnp.float32)  # of the transforms
        u = (x @ self.m_in[...].astype(x.dtype)).astype(dtype)
        y = fft_convolution(u, filters.astype(dtype).T).astype(x.dtype)
        return y if self.backward is None else y + from_the_end(self.backward, x, mask)

    def scales(self) -> Float[Array, "K D"]:
        """sigma_k^(1/4) m_filters[k], at least in float32."""
        return (self.sigma[...] ** 0.25)[:, None] * self.m_filters[...].astype(
            self.sigma[...].dtype
        )

    def init_state(self, batch_size: int) -> State:
        """What `step` knows before the first input; its size depends on K and D, not on L.

        Raises:
            ValueError: the model is bidirectional.
        """
        refuse_to_stream(self.causal)
        width = self.m_in.shape[0]
        features = initial_features(batch_size, width, self.filters, self.seq_len, self.num_filters)
        return (
            {"plus": features, "minus": features} if self.negative_filters else {"plus": features}
        )

    def step(self, state: State, u_t: Float[Array, "B D"]) -> tuple[State, Float[Array, "B D"]]:
        """One more input and its output, as `__call__` gives it, up to the error that `filter_recurrence` states.

        Made for L steps: after them filters go on where those of `__call__` end.
        """
        x_t = (u_t @ self.m_in[...].astype(u_t.dtype)).astype(state["plus"].dtype)
        bank = (self.filters, self.seq_len, self.num_filters)
        new = {"plus": next_features(state["plus"], x_t, *bank)}
        features = new["plus"]
        if self.negative_filters:
            new["minus"] = next_features(state["minus"], x_t, *bank, alternate=True)
            features = features + new["minus"]
        scales = self.scales()[: features.shape[1]].astype(features.dtype)
        return new, jnp.sum(features[:, : len(scales)] * scales[None], axis=1).astype(u_t.dtype)
