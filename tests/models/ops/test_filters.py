"""Spectral filters against 60-digit arithmetic, the definition of their matrices, and misuse."""

import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from models.ops.filters import alternative_filters, spectral_filters

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "spectral_filters.npz")


def hankel(seq_len):
    n = np.add.outer(np.arange(1.0, seq_len + 1), np.arange(1, seq_len + 1))
    return 2 / (n**3 - n)


def alternative_hankel(seq_len):
    n = np.add.outer(np.arange(1.0, seq_len + 1), np.arange(1, seq_len + 1))
    return ((-1) ** (n - 2) + 1) * 8 / ((n + 3) * (n - 1) * (n + 1))


@pytest.mark.parametrize(
    ("seq_len", "num", "sigma_error", "phi_error"), [(32, 16, 1e-9, 1e-9), (64, 24, 1e-6, 1e-6), (128, 24, 1e-8, 2e-8)]
)
def test_filters_equal_exact_arithmetic(seq_len, num, sigma_error, phi_error):
    sigma, phi = spectral_filters(seq_len, 24)
    np.testing.assert_allclose(sigma[:num], GOLDEN[f"sigma_{seq_len}"][:num], rtol=sigma_error)
    distance = np.linalg.norm(phi - GOLDEN[f"phi_{seq_len}"], axis=0)[:num]
    assert distance.max() < phi_error


@pytest.mark.parametrize(("filters", "matrix"), [(spectral_filters, hankel), (alternative_filters, alternative_hankel)])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 24, 65, 300])
def test_filters_are_the_largest_eigenpairs(filters, matrix, seq_len):
    num = min(seq_len, 24)
    sigma, phi = filters(seq_len, num)
    assert sigma.shape == (num,)
    assert phi.shape == (seq_len, num)
    z = matrix(seq_len)
    np.testing.assert_allclose(z @ phi, phi * sigma[None], atol=1e-14)
    np.testing.assert_allclose(phi.T @ phi, np.eye(num), atol=1e-13)
    np.testing.assert_allclose(sigma, np.linalg.eigvalsh(z)[::-1][:num], atol=1e-14)
    assert (np.diff(sigma) <= 0).all()
    assert (sigma > 0).all()


def test_first_entries_are_positive():
    assert (spectral_filters(200, 24)[1][0] > 0).all()


def test_alternative_filters_have_a_parity_and_its_first_entry_is_positive():
    _, phi = alternative_filters(65, 24)
    even = phi[0] != 0
    assert 0 < even.sum() < 24
    assert (phi[1::2, even] == 0).all()
    assert (phi[::2, ~even] == 0).all()
    assert (phi[0, even] > 0).all()
    assert (phi[1, ~even] > 0).all()


def test_alternative_eigenvalues_have_high_relative_precision():
    # The Rayleigh quotient of an accurate vector is accurate in relative terms where `eigvalsh` is not.
    sigma, phi = alternative_filters(40, 24)
    z = [
        [Fraction(8 * (1 + (-1) ** (i + j)), (i + j + 3) * (i + j - 1) * (i + j + 1)) for j in range(1, 41)]
        for i in range(1, 41)
    ]
    for k in (0, 11, 15):
        v = [Fraction(float(x)) for x in phi[:, k]]
        quotient = sum(v[i] * z[i][j] * v[j] for i in range(40) for j in range(40)) / sum(x * x for x in v)
        assert abs(float(quotient) / sigma[k] - 1) < 1e-9


def test_longest_task_never_holds_its_matrix():
    tracemalloc.start()
    sigma, phi = spectral_filters(16384, 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 16384**2 / 8
    np.testing.assert_allclose(phi.T @ phi, np.eye(24), atol=1e-12)
    n = np.arange(2.0, 16386)[None] + np.array([0, 1, 98, 16383])[:, None]
    np.testing.assert_allclose(2 / (n**3 - n) @ phi, phi[[0, 1, 98, 16383]] * sigma[None], atol=1e-14)


@pytest.mark.parametrize("filters", [spectral_filters, alternative_filters])
def test_results_are_cached_and_cannot_be_changed(filters):
    sigma, phi = filters(16, 4)
    assert filters(16, 4)[1] is phi
    for array in (sigma, phi):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("filters", [spectral_filters, alternative_filters])
@pytest.mark.parametrize(
    ("seq_len", "num_filters", "message"),
    [
        (8, 24, r"num_filters=24 exceeds seq_len=8.*model\.num_filters.*task\.seq_len"),
        (0, 1, r"seq_len=0.*task\.seq_len"),
        (8, 0, r"num_filters=0.*model\.num_filters"),
    ],
)
def test_impossible_sizes_are_refused(filters, seq_len, num_filters, message):
    with pytest.raises(ValueError, match=message):
        filters(seq_len, num_filters)
