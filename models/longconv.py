"""SGConv, a convolution with a structured kernel as long as the input.

The kernel of each channel consists of sub-kernels with d parameters each (equation 1):

    k = [k_0, k_1, ..., k_{S-1}] / Z,   k_i = alpha^i Upsample(w_i, 2^max(i-1, 0) d)
    y = k * u + D u

S = ceil(log2(L / d)) + 1 sub-kernels reach L, and later ones have smaller weights. Z is the norm of
the initial kernel.

Paper: Li et al. 2022, "What Makes Convolutional Models Great on Long Sequence Modeling?"
(arXiv 2210.09298). Reference code read: ctlllll/SGConv. Its further options and the deviations:
docs/models/longconv.md.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from models.checks import at_least_float32, check_option
from models.mixer import Mask, MixerModule, Sequences
from models.ops.fft_convolution import convolve_directions

INITS = ("normal", "cosine")
DECAYS = ("geometric", "power")
INTERPOLATIONS = ("linear", "nearest")


class KernelNorm(nnx.Variable):
    """Z, not trained."""


class LongConv(MixerModule):
    """Structured global convolution; causal unless bidirectional.

    Args:
        seq_len: the longest input; it sets the number of sub-kernels.
        kernel_dim: d, parameters of each sub-kernel of a channel.
        init: normal | cosine (channel c, in random order, has c periods in each sub-kernel).
        init_scale: sub-kernels are 2^init_scale times longer, and accordingly fewer.
        decay: geometric, k_i has the factor rate^-i (alpha = 1 / rate) | power, k(t) has the factor
            (t + 1)^-rate.
        decay_min, decay_max: range of the channels' rates, evenly spaced and not trained.
        interpolation: linear | nearest, of the upsampling.
        bidirectional: adds a kernel over the positions after the current one.
    Raises:
        ValueError: an option is unknown, the first sub-kernel is longer than L, or the rates are
            not 0 < decay_min <= decay_max.
    """

    grows_with_length = True  # one more sub-kernel whenever L doubles

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        kernel_dim: int,
        init: str,
        init_scale: int,
        decay: str,
        decay_min: float | int,
        decay_max: float | int,
        interpolation: str,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        check_option("model.init", init, INITS)
        check_option("model.decay", decay, DECAYS)
        check_option("model.interpolation", interpolation, INTERPOLATIONS)
        if kernel_dim < 1 or init_scale < 0:
            raise ValueError(
                f"model.kernel_dim={kernel_dim}, model.init_scale={init_scale} must be at least "
                "1 and 0"
            )
        first = kernel_dim * 2**init_scale
        if first > seq_len:
            raise ValueError(
                f"model.kernel_dim={kernel_dim} with model.init_scale={init_scale} makes a first "
                f"sub-kernel of {first}, longer than task.seq_len={seq_len}; lower one of them"
            )
        if not 0 < decay_min <= decay_max < float("inf"):
            raise ValueError(
                f"model.decay_min={decay_min}, model.decay_max={decay_max}: "
                "expected 0 < decay_min <= decay_max"
            )
        self.causal = not bidirectional
        self.stretch, self.decay, self.interpolation = 2**init_scale, decay, interpolation
        self.rates = (decay_min, decay_max)
        num_scales = 1 + (-(-seq_len // first) - 1).bit_length()
        directions = 2 if bidirectional else 1
        shape = (num_scales, directions, width, kernel_dim)
        self.w = nnx.Param(
            rngs.params.normal(shape) if init == "normal" else cosine_kernels(rngs.params(), *shape)
        )
        self.z = KernelNorm(jnp.linalg.norm(self.unscaled_kernel(), axis=-1))
        self.d = nnx.Param(rngs.params.normal((width,)))

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        u = at_least_float32(x)  # the transform loses too many digits in 16 bits
        y = convolve_directions(u, mask, self.kernels(x.shape[1]))
        return (y + self.d[...][None, None] * u).astype(x.dtype)

    def kernels(self, length: int) -> Float[Array, "K D L"]:
        """The kernel of each direction, cut to the input."""
        return self.unscaled_kernel()[..., :length] / self.z[...][..., None]

    def unscaled_kernel(self) -> Float[Array, "K D T"]:
        """[k_0, ..., k_{S-1}], not divided by Z; T >= L is the total length of S sub-kernels."""
        w = self.w[...]
        rates = jnp.linspace(*self.rates, w.shape[2], dtype=w.dtype)[None, :, None]
        parts = []
        for i in range(w.shape[0]):
            part = upsample(w[i], self.stretch * 2 ** max(i - 1, 0), self.interpolation)
            parts.append(part * rates**-i if self.decay == "geometric" else part)
        kernel = jnp.concatenate(parts, axis=-1)
        if self.decay == "geometric":
            return kernel
        return kernel * (1.0 + jnp.arange(kernel.shape[-1], dtype=w.dtype))[None, None] ** -rates


def upsample(w: Float[Array, "K D d"], factor: int, interpolation: str) -> Float[Array, "K D T"]:
    """`w` upsampled to T = factor d values.

    Linear interpolation is constant beyond the outer two centres. All steps have the same
    interpolation weights. This avoids a gather, whose gradient is a sum in no fixed order on a GPU,
    and a (d, T) matrix.
    """
    if interpolation == "nearest":
        return jnp.repeat(w, factor, axis=-1)
    before = jnp.concatenate([w[..., :1], w[..., :-1]], axis=-1)
    after = jnp.concatenate([w[..., 1:], w[..., -1:]], axis=-1)
    # distance from the centre of the step
    offset = ((jnp.arange(factor, dtype=w.dtype) + 0.5) / factor - 0.5)[None, None, None]
    steps = (
        w[..., None] * (1 - jnp.abs(offset))
        + before[..., None] * jax.nn.relu(-offset)
        + after[..., None] * jax.nn.relu(offset)
    )
    return steps.reshape(*w.shape[:2], -1)


def cosine_kernels(
    key: PRNGKeyArray, scales: int, directions: int, width: int, size: int
) -> Float[Array, "S K D d"]:
    """cos(2 pi c s), s = 0..1 in d steps, for channels c = 0..D-1, permuted in each scale."""
    waves = jnp.cos(2 * jnp.pi * jnp.arange(width)[:, None] * jnp.linspace(0, 1, size)[None])
    shuffled = jnp.stack([jax.random.permutation(k, waves) for k in jax.random.split(key, scales)])
    return jnp.tile(shuffled[:, None], (1, directions, 1, 1))
