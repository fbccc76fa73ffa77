"""S4D, a diagonal state space model per channel.

Each channel has a single-input single-output model with its own diagonal A and Delta:

    x_k = lam_bar x_{k-1} + b_bar u_k,   y_k = 2 Re(C x_k) + D u_k
    A = -exp(log_a_real) + i a_imag

over N/2 states, one of each conjugate pair. `__call__` convolves with
K_l = 2 Re sum_n C_n b_bar_n lam_bar_n^l.

Paper: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
(arXiv 2206.11893). Reference code read: state-spaces/s4.

Deviations: S4D-LegS initializes B with |V^H B|, because the phases of the eigenvectors are
arbitrary and those of C random; the published code keeps the phases that LAPACK returns and clips
the imaginary parts. The scale is that of the code, twice the theorem's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from models.checks import at_least_float32, check_option, require_causal
from models.mixer import Mask, MixerModule, Sequences
from models.ops.fft_convolution import convolve_directions
from models.ops.state_space import (
    DISCRETIZATIONS,
    discretize,
    hippo_normal,
    log_uniform_steps,
    vandermonde_kernel,
)

INITS = ("lin", "inv", "legs")


class S4D(MixerModule):
    """A diagonal state space model per channel, as a long convolution; causal unless bidirectional.

    Args:
        state_size: N, even; each channel has N/2 complex states, one of each conjugate pair.
        init: lin | inv | legs, the initial eigenvalues of A: S4D-Lin, S4D-Inv, S4D-LegS.
        num_ssms: number of pairs (A, B), a divisor of D; channels share them in turn. None for one
            per channel.
        discretization: zoh | bilinear.
        dt_min, dt_max: range of the initial Delta of each channel, log-uniform.
        bidirectional: adds a kernel, with its own C, over the positions after the current one.
    Raises:
        ValueError: an option is unknown, N is odd, or num_ssms does not divide D.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        state_size: int,
        init: str,
        num_ssms: int | None,
        discretization: str,
        dt_min: float | int,
        dt_max: float | int,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        if state_size < 2 or state_size % 2:
            raise ValueError(
                f"model.state_size={state_size} must be even and at least 2, because its states "
                "are conjugate pairs"
            )
        if num_ssms is not None and (num_ssms < 1 or width % num_ssms):
            raise ValueError(
                f"model.num_ssms={num_ssms} must be at least 1 and divide backbone.width={width}"
            )
        check_option("model.discretization", discretization, DISCRETIZATIONS)
        check_option("model.init", init, INITS)
        self.causal, self.discretization = not bidirectional, discretization
        a_imag, b = initial_system(init, state_size)
        half, copies = state_size // 2, width if num_ssms is None else num_ssms
        self.log_a_real = nnx.Param(jnp.full((copies, half), math.log(0.5)))
        self.a_imag = nnx.Param(jnp.tile(jnp.asarray(a_imag, jnp.float32), (copies, 1)))
        self.b_re = nnx.Param(jnp.tile(jnp.asarray(b, jnp.float32), (copies, 1)))
        self.b_im = nnx.Param(jnp.zeros((copies, half)))
        directions = 2 if bidirectional else 1
        self.c_re = nnx.Param(math.sqrt(0.5) * rngs.params.normal((directions, width, half)))
        self.c_im = nnx.Param(math.sqrt(0.5) * rngs.params.normal((directions, width, half)))
        self.log_step = nnx.Param(log_uniform_steps(rngs.params(), (width,), dt_min, dt_max))
        self.d = nnx.Param(rngs.params.normal((width,)))

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        u = at_least_float32(x)  # the transform and the kernel lose too many digits in 16 bits
        log_lam_bar, b_bar = self.system()
        c = jax.lax.complex(self.c_re[...], self.c_im[...])
        kernels = vandermonde_kernel(c * b_bar[None], log_lam_bar, x.shape[1])  # (1 or 2, D, L)
        y = convolve_directions(u, mask, kernels)
        return (y + self.d[...][None, None] * u).astype(x.dtype)

    def init_state(self, batch_size: int) -> Complex[Array, "B D N_half"]:
        """The state before the first input, zero; a ValueError if the model is bidirectional."""
        require_causal(self.causal)
        return jnp.zeros((batch_size, *self.c_re.shape[1:]), jnp.complex64)

    def step(
        self, state: Complex[Array, "B D N_half"], u_t: Float[Array, "B D"]
    ) -> tuple[Complex[Array, "B D N_half"], Float[Array, "B D"]]:
        log_lam_bar, b_bar = self.system()
        u = at_least_float32(u_t)
        state = jnp.exp(log_lam_bar)[None] * state + b_bar[None] * u[..., None]
        y = 2 * jnp.sum(state.real * self.c_re[...] - state.imag * self.c_im[...], axis=-1)
        return state, (y + self.d[...][None] * u).astype(u_t.dtype)

    def system(self) -> tuple[Complex[Array, "D N_half"], Complex[Array, "D N_half"]]:
        """log(lam_bar) and b_bar of the sampled system of each channel."""
        a = jax.lax.complex(-jnp.exp(self.log_a_real[...]), self.a_imag[...])
        b = jax.lax.complex(self.b_re[...], self.b_im[...])
        repeats = (self.log_step.shape[0] // a.shape[0], 1)
        a, b = jnp.tile(a, repeats), jnp.tile(b, repeats)  # (D, N/2)
        step = jnp.broadcast_to(jnp.exp(self.log_step[...])[:, None], a.shape)
        log_lam_bar, factor = discretize(a, step, self.discretization)
        return log_lam_bar, factor * b


def initial_system(
    init: str, state_size: int
) -> tuple[Float[np.ndarray, " N_half"], Float[np.ndarray, " N_half"]]:
    """Initial imaginary parts of A, whose real parts are -1/2, and initial B, n = 0..N/2-1.

    Source: S4D, section 4: pi n for S4D-Lin and N/pi (N / (2n + 1) - 1) for S4D-Inv, with B = 1;
        HiPPO-N for S4D-LegS.
    """
    n = np.arange(state_size // 2)
    if init == "legs":
        lam, vectors = hippo_normal(state_size)
        b = np.abs(vectors.conj().T @ np.sqrt(2.0 * np.arange(state_size) + 1.0))
        return -lam.imag[: len(n)], b[: len(n)]
    imag = np.pi * n if init == "lin" else state_size / np.pi * (state_size / (2 * n + 1) - 1)
    return imag, np.ones(len(n))
