"""Which fixed filters does a spectral state-space model convolve with, and how much does each of them count?

Paper: Agarwal, Suo, Chen, Hazan, "Spectral State Space Models", arXiv 2312.06837: the Hankel matrix Z before equation
(2), and the matrix of appendix D (7). Reference code read: google-deepmind/spectral_ssm, which builds Z in a Python
double loop and calls `eigh`.

Deviation: Z is never formed. It is the integral over alpha of mu(alpha) mu(alpha)^T, with mu(alpha) = (1 - alpha) (1,
alpha, alpha^2, ...) on [0, 1] for Z and (1 - alpha^2) (1, alpha, ...) on [-1, 1] for the alternative matrix. A
quadrature of that integral is a factor M with Z = M M^T and a few hundred columns, so that the left singular vectors of
M are the filters and its squared singular values the eigenvalues. `eigh` of Z knows an eigenvalue to 1e-16 of the
largest one; the SVD of M knows its square root so.

The filters also follow a small linear recurrence (`filter_recurrence`), which is how they are applied one input at a time.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from models.ops.filter_cache import kept

# At 16 nodes a panel the eigenvalues near 1e-24 lose a digit, at 12 all of them; beyond 24 nothing is gained.
_NODES_PER_PANEL = 24
# Enough for float32 at K = 24 and any length, see `filter_recurrence`.
_EXTRA_STATES = 24
# Eigenvectors of smaller eigenvalues carry noise, which as part of a recurrence can grow.
_SMALLEST_EIGENVALUE = 1e-30


def spectral_filters(
    seq_len: int, num_filters: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "L K"]]:
    """The `num_filters` largest eigenvalues sigma of Z (descending) and their unit eigenvectors phi (columns, phi[0] >
    0).

    Z[i, j] = 2 / ((i + j)^3 - (i + j)), i, j = 1..L. Relative errors grow as 1e-18 / sqrt(sigma): 1e-8 at eigenvalues
    of 1e-20, which is the 24th at L = 128; 1e-3 at 1e-30, the 24th at L = 32. Below 1e-32, at L < 30 only, float64
    resolves nothing: what is returned there is finite, orthonormal to the others and otherwise arbitrary. It is not
    refused, since a model weighs it by sigma^(1/4), at most 1e-8.

    The arrays are read-only and kept: in memory, and from L = 1024 on in the user's cache (`models.ops.filter_cache`).

    Raises:
        ValueError: if a size is not positive, or `num_filters` exceeds `seq_len`.
    Source: Agarwal et al. 2023, section 2. The paper leaves the sign of a filter open; ours makes its first entry
    positive.
    """
    return _filters("hankel", seq_len, num_filters)


def uncached_spectral_filters(
    seq_len: int, num_filters: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "L K"]]:
    """`spectral_filters`, computed whatever is kept."""
    _check_sizes(seq_len, num_filters)
    return _hankel_filters(seq_len, num_filters)


def alternative_filters(
    seq_len: int, num_filters: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "L K"]]:
    """The same for the matrix of appendix D, whose filters serve eigenvalues in [-1, 1] without a second,
    sign-alternated set.

    Z[i, j] = ((-1)^(i+j-2) + 1) 8 / ((i+j+3) (i+j-1) (i+j+1)) couples only entries of equal parity, so that each filter
    is exactly zero on one parity and positive at the first entry of the other: phi[0] > 0 or phi[0] = 0 < phi[1].

    Raises:
        ValueError: as `spectral_filters`.
    Source: Agarwal et al. 2023, appendix D, equation (7).
    """
    return _filters("alternative", seq_len, num_filters)


@lru_cache(maxsize=64)
def filter_recurrence(
    kind: str, seq_len: int, num_filters: int, extra_states: int = _EXTRA_STATES
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
    """The linear recurrence that the filters follow in time: a and b such that phi_k(i) = (b a^i)_k. Whence h_t =
    h_{t-1} a + b u_t holds the features sum_i u_{t-i} phi_k(i), k = 0..K-1, as its first entries.

    A filter is a combination of powers alpha^i, so what is left of it after one step is another. In the basis of all
    filters that step is a matrix, whose entry from filter j to filter k falls as sigma_j / sigma_k; cut after N filters it
    loses sigma_N / sigma_K. With orthonormal filters as coordinates float32 suffices, where the powers themselves as
    coordinates would need weights near sigma_k^(-1/4) that cancel. The error of filter k, as the root of its summed
    squares times sigma_k^(1/4), is at K = 24, in float64 and the largest over L from 64 to 16,384 and over k, for 0, 4, 8,
    16 and 24 extra states
        hankel       6e-4, 1e-5, 2e-7, 6e-11, 3e-13,
        alternative  1e-2, 2e-3, 3e-4, 6e-6, 9e-8.
    N = L is exact. Filters end at time L; the recurrence goes on with the same combinations of powers.

    Args:
        kind: hankel (`spectral_filters`) | alternative (`alternative_filters`).
        extra_states: N - K, where L does not end before. N stays below it, and even below K, where further eigenvalues are
            under 1e-30: filters that are left out weigh less than 4e-8.
    Raises:
        ValueError: as `spectral_filters`.
    """
    _check_sizes(seq_len, num_filters)
    sigma, phi = _filters(kind, seq_len, min(seq_len, num_filters + extra_states))
    if phi.shape[1] < seq_len:
        phi = phi[:, sigma > _SMALLEST_EIGENVALUE]
    # Not phi[:-1].T @ phi[1:], which would shift in a zero after the last entry.
    a = np.linalg.lstsq(phi[:-1], phi[1:], rcond=None)[0]
    return _frozen(a, phi[0])


@lru_cache(maxsize=64)
def _filters(kind: str, seq_len: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    _check_sizes(seq_len, num_filters)
    make = {"hankel": _hankel_filters, "alternative": _alternative_filters}[kind]
    return _frozen(*kept(kind, seq_len, num_filters, lambda: make(seq_len, num_filters)))


def _hankel_filters(seq_len: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    gap, weight = _quadrature(seq_len)
    powers = np.exp(np.arange(seq_len)[:, None] * np.log1p(-gap)[None, :])
    sigma, phi = _eigenpairs(powers * (gap * np.sqrt(weight))[None, :])
    return sigma[:num_filters], phi[:, :num_filters]


def _alternative_filters(seq_len: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    gap, weight = _quadrature(seq_len)
    powers = np.exp(np.arange(seq_len)[:, None] * np.log1p(-gap)[None, :])
    # 1 - alpha^2 from the gap 1 - alpha, since alpha^2 has lost the gap; both halves of [-1, 1] contribute the same.
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
            f"model.num_filters={num_filters} exceeds task.seq_len={seq_len}, which has only {seq_len} filters; "
            "lower model.num_filters or raise task.seq_len"
        )


def _quadrature(seq_len: int) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """Gauss-Legendre nodes, as gaps 1 - alpha, and weights on the panels [1 - 2^-j, 1 - 2^-(j+1)] of [0, 1]."""
    # Panels shrink until powers up to alpha^(2L) no longer vary on the last one, which reaches 1.
    panels = int(np.ceil(np.log2(max(seq_len, 2)))) + 3
    upper = 2.0 ** -np.arange(panels)
    lower = np.append(upper[1:], 0.0)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES_PER_PANEL)
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
