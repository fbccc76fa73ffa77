"""The filters of spectral state space models and their eigenvalues.

Paper: Agarwal, Suo, Chen, Hazan, "Spectral State Space Models", arXiv 2312.06837: the Hankel matrix
Z before equation (2), and the matrix of appendix D (7). Reference code read:
google-deepmind/spectral_ssm, which builds Z in a Python double loop and calls `eigh`.

Deviation: Z is never formed. It is the integral over alpha of mu(alpha) mu(alpha)^T, with mu(alpha)
= (1 - alpha) (1, alpha, alpha^2, ...) on [0, 1] for Z and (1 - alpha^2) (1, alpha, ...) on [-1, 1]
for the alternative matrix. A quadrature of this integral gives a factor M with Z = M M^T and a few
hundred columns. The filters are the left singular vectors of M, the eigenvalues its squared
singular values. `eigh` of Z has an absolute error of 1e-16 of the largest eigenvalue; the SVD of M
has this error in the square roots.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from models.ops.filter_cache import load_or_compute


def spectral_filters(
    seq_len: int, num_filters: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "L K"]]:
    """The `num_filters` largest eigenvalues of Z and their unit eigenvectors.

    Z[i, j] = 2 / ((i + j)^3 - (i + j)), i, j = 1..L. Relative errors grow as 1e-18 / sqrt(sigma):
    1e-8 at eigenvalues of 1e-20, the 24th at L = 128; 1e-3 at 1e-30, the 24th at L = 32.
    Eigenvalues below 1e-32, which occur only for L < 30, are not resolved by float64: their
    eigenvectors are finite, orthonormal to the others and otherwise arbitrary; a model weighs them
    by sigma^(1/4), at most 1e-8.

    The arrays are read-only and cached in memory and on disk (`models.ops.filter_cache`).

    Returns:
        sigma in descending order, and phi as columns with phi[0] > 0 (the paper states no sign).
    Raises:
        ValueError: a size is not positive, or `num_filters` exceeds `seq_len`.
    Source: Agarwal et al. 2023, section 2.
    """
    return _filters("hankel", seq_len, num_filters)


def alternative_filters(
    seq_len: int, num_filters: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "L K"]]:
    """As `spectral_filters`, for the matrix of appendix D.

    These filters cover eigenvalues in [-1, 1] without a second, sign-alternated set.
    Z[i, j] = ((-1)^(i+j-2) + 1) 8 / ((i+j+3) (i+j-1) (i+j+1)) couples only entries of equal parity,
    so that each filter is exactly zero on one parity and positive at the first entry of the other:
    phi[0] > 0 or phi[0] = 0 < phi[1].

    Raises:
        ValueError: as `spectral_filters`.
    Source: Agarwal et al. 2023, appendix D, equation (7).
    """
    return _filters("alternative", seq_len, num_filters)


@lru_cache(maxsize=64)
def filter_recurrence(
    kind: str, seq_len: int, num_filters: int, extra_states: int = 24
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
    """a and b such that phi_k(i) = (b a^i)_k: the linear recurrence of the filters in time.

    The first entries of h_t = h_{t-1} a + b u_t are therefore the features sum_i u_{t-i} phi_k(i),
    k = 0..K-1.

    A filter is a combination of powers alpha^i, and so is the filter shifted by one step. In the
    basis of all filters the shift is a matrix whose entry from filter j to filter k falls as
    sigma_j / sigma_k; truncation to N filters has an error of sigma_N / sigma_K. Orthonormal
    filters as coordinates suffice in float32; powers would need weights that cancel. The error of
    filter k is the root of its summed squares times sigma_k^(1/4). Its maximum over k and over L
    from 64 to 16,384, at K = 24 in float64, for 0, 4, 8, 16 and 24 extra states, is
        hankel       6e-4, 1e-5, 2e-7, 6e-11, 3e-13,
        alternative  1e-2, 2e-3, 3e-4, 6e-6, 9e-8.
    N = L is exact. After time L the recurrence continues the same combinations of powers.

    Args:
        kind: hankel (`spectral_filters`) | alternative (`alternative_filters`).
        extra_states: N - K, at most. N is smaller if L is, or if further eigenvalues are below
            1e-30 (then even below K): the omitted filters weigh less than 4e-8.
    """
    sigma, phi = _filters(kind, seq_len, min(seq_len, num_filters + extra_states))
    if phi.shape[1] < seq_len:  # eigenvectors of smaller eigenvalues are noise, which can grow
        phi = phi[:, sigma > 1e-30]
    # not phi[:-1].T @ phi[1:], which would shift in a zero after the last entry
    a = np.linalg.lstsq(phi[:-1], phi[1:], rcond=None)[0]
    return _frozen(a, phi[0])


@lru_cache(maxsize=64)
def _filters(kind: str, seq_len: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    _check_sizes(seq_len, num_filters)
    make = {"hankel": uncached_spectral_filters, "alternative": _alternative_filters}[kind]
    return _frozen(*load_or_compute(kind, seq_len, num_filters, lambda: make(seq_len, num_filters)))


def uncached_spectral_filters(seq_len: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    """`spectral_filters` without the caches and the checks."""
    gap, weight = _quadrature(seq_len)
    powers = np.exp(np.arange(seq_len)[:, None] * np.log1p(-gap)[None, :])
    sigma, phi = _eigenpairs(powers * (gap * np.sqrt(weight))[None, :])
    return sigma[:num_filters], phi[:, :num_filters]


def _alternative_filters(seq_len: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    gap, weight = _quadrature(seq_len)
    powers = np.exp(np.arange(seq_len)[:, None] * np.log1p(-gap)[None, :])
    # 1 - alpha^2 from the gap 1 - alpha; both halves of [-1, 1] contribute equally
    mu = powers * (gap * (2 - gap) * np.sqrt(2 * weight))[None, :]
    sigmas, columns = [], []
    for parity in range(min(2, seq_len)):
        sigma, half = _eigenpairs(mu[parity::2])
        phi = np.zeros((seq_len, len(sigma)))
        phi[parity::2] = half
        sigmas.append(sigma)
        columns.append(phi)
    sigma, phi = np.concatenate(sigmas), np.concatenate(columns, axis=1)
    order = np.argsort(-sigma, kind="stable")[:num_filters]
    return sigma[order], phi[:, order]


def _check_sizes(seq_len: int, num_filters: int) -> None:
    if seq_len < 1:
        raise ValueError(f"task.seq_len={seq_len} is not positive")
    if num_filters < 1:
        raise ValueError(f"model.num_filters={num_filters} is not positive")
    if num_filters > seq_len:
        raise ValueError(
            f"model.num_filters={num_filters} exceeds task.seq_len={seq_len}, which has only "
            f"{seq_len} filters; lower model.num_filters or raise task.seq_len"
        )


def _quadrature(seq_len: int) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """Gauss-Legendre nodes, as gaps 1 - alpha, and weights on panels [1 - 2^-j, 1 - 2^-(j+1)]."""
    # panels shrink until powers up to alpha^(2L) are nearly constant on the last one, up to 1
    panels = int(np.ceil(np.log2(max(seq_len, 2)))) + 3
    upper = 2.0 ** -np.arange(panels)
    lower = np.append(upper[1:], 0.0)
    # with 16 nodes per panel the eigenvalues near 1e-24 lose a digit; more than 24 change nothing
    nodes, weights = np.polynomial.legendre.leggauss(24)
    gap = lower[:, None] + (upper - lower)[:, None] * (nodes[None, :] + 1) / 2
    return gap.ravel(), ((upper - lower)[:, None] * weights[None, :] / 2).ravel()


def _eigenpairs(
    factor: Float[np.ndarray, "L Q"],
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, "L R"]]:
    """Eigenvalues (descending) and eigenvectors (first entry not negative) of factor @ factor.T."""
    vectors, values, _ = np.linalg.svd(factor, full_matrices=False)
    return values**2, vectors * np.where(vectors[:1] < 0, -1.0, 1.0)


def _frozen(sigma: np.ndarray, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sigma, phi = np.ascontiguousarray(sigma), np.ascontiguousarray(phi)
    sigma.setflags(write=False)
    phi.setflags(write=False)
    return sigma, phi
