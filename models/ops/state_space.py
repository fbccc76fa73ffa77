"""Initialization, discretization and convolution kernels of diagonal state space models.

Papers: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
(S4D, arXiv 2206.11893); Smith et al. 2023, "Simplified State Space Layers for Sequence Modeling"
(S5, arXiv 2208.04933). Reference code read: lindermanlab/S5 and state-spaces/s4.

Discrete systems are represented by the logarithm of lam_bar: powers are then products, and the
decay of a slow state keeps its relative accuracy, which rounding of 1 - |lam_bar| would lose.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

DISCRETIZATIONS = ("zoh", "bilinear")


def hippo_normal(size: int) -> tuple[Complex[np.ndarray, " N"], Complex[np.ndarray, "N N"]]:
    """Eigenvalues and unit eigenvectors (columns) of HiPPO-N, in complex128.

    HiPPO-LegS is -sqrt(2i+1) sqrt(2j+1) below the diagonal and -(i+1) on it; adding p p^T with
    p_i = sqrt(i + 1/2) gives its normal part, -1/2 plus a skew-symmetric matrix. Imaginary parts
    ascend, so that the first half holds one of each conjugate pair.

    Source: S5, section 2.3 and appendix B.1; S4D, section 3.
    """
    root = np.sqrt(2.0 * np.arange(size) + 1.0)
    below = np.tril(np.outer(root, root), -1)
    frequencies, vectors = np.linalg.eigh(-0.5j * (below.T - below))
    return -0.5 + 1j * frequencies, vectors


def discretize(
    lam: Complex[Array, "*N"], step: Float[Array, "*N"], rule: str
) -> tuple[Complex[Array, "*N"], Complex[Array, "*N"]]:
    """log(lam_bar) and factor of the sampled system x_k = lam_bar x_{k-1} + factor b u_k.

    Args:
        lam: eigenvalues of the continuous system x' = lam x + b u; not 0.
        step: Delta, above 0.
        rule: zoh, lam_bar = exp(lam Delta) and factor = (lam_bar - 1) / lam; or
            bilinear, lam_bar = (1 + lam Delta / 2) / (1 - lam Delta / 2) and
            factor = Delta / (1 - lam Delta / 2).
    """
    z = lam * step
    if rule == "zoh":
        return z, jnp.expm1(z) / lam  # expm1, because exp(z) of slow states is within 1e-3 of 1
    half = 0.5 * z
    re, im = half.real, half.imag
    distance = (1 - re) ** 2 + im**2  # |1 - z/2|^2
    log_radius = 0.5 * jnp.log1p(4 * re / distance)
    angle = jnp.arctan2(2 * im, 1 - re**2 - im**2)
    return jax.lax.complex(log_radius, angle), step / (1 - half)


def log_uniform_steps(
    key: Array, shape: tuple[int, ...], low: float | int, high: float | int
) -> Float[Array, "*S"]:
    """log(Delta), uniform between log(low) and log(high); a ValueError unless 0 < low <= high."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"model.dt_min={low}, model.dt_max={high}: expected 0 < dt_min <= dt_max")
    return jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high))


def vandermonde_kernel(
    weights: Complex[Array, "K D N"], log_lam_bar: Complex[Array, "D N"], length: int
) -> Float[Array, "K D L"]:
    """2 Re sum_n weights[., d, n] lam_bar[d, n]^l for l = 0..L-1.

    The powers are lam_bar^(q T + r) with T about sqrt(L): one product of a (Q, N) and an (N, T)
    matrix per channel, with D N 2 sqrt(L) exponentials instead of D N L.

    Source: S4D, section 3.2 (the Vandermonde product).
    """
    inner_size, outer_size = split_powers(length)
    inner_re, inner_im = _powers(log_lam_bar, 1, inner_size)  # (D, N, T)
    outer_re, outer_im = _powers(log_lam_bar, inner_size, outer_size)  # (D, N, Q)
    w_re, w_im = weights.real[..., None], weights.imag[..., None]
    left_re = w_re * outer_re[None] - w_im * outer_im[None]
    left_im = w_re * outer_im[None] + w_im * outer_re[None]

    def product(left, right):
        # highest precision, because the terms of the sum cancel
        return jnp.einsum("kdnq,dnt->kdqt", left, right, precision="highest")

    kernel = 2 * (product(left_re, inner_re) - product(left_im, inner_im))
    return kernel.reshape(*weights.shape[:2], -1)[..., :length]


def split_powers(length: int) -> tuple[int, int]:
    """T and Q, about sqrt(L), such that every l < L is q T + r with r < T and q < Q."""
    size = math.isqrt(length - 1) + 1
    return size, -(-length // size)


def _powers(log_lam_bar: Complex[Array, "D N"], stride: int, count: int) -> tuple[Array, Array]:
    """Real and imaginary parts of lam_bar^(stride * i), i = 0..count-1."""
    exponents = stride * jnp.arange(count, dtype=log_lam_bar.real.dtype)[None, None]
    radius = jnp.exp(log_lam_bar.real[..., None] * exponents)
    angle = log_lam_bar.imag[..., None] * exponents
    return radius * jnp.cos(angle), radius * jnp.sin(angle)
