"""Spectral filters against 60-digit arithmetic, the definition of their matrices, and misuse."""

import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from models.ops import filters as module
from models.ops.filters import alternative_filters, filter_recurrence, spectral_filters

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "spectral_filters.npz")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    """Filters are made here, not found in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module._filters.cache_clear()


def hankel(seq_len):
    n = np.add.outer(np.arange(1.0, seq_len + 1), np.arange(1, seq_len + 1))
    return 2 / (n**3 - n)


def alternative_hankel(seq_len):
    n = np.add.outer(np.arange(1.0, seq_len + 1), np.arange(1, seq_len + 1))
    return ((-1) ** (n - 2) + 1) * 8 / ((n + 3) * (n - 1) * (n + 1))


@pytest.mark.parametrize(
    ("seq_len", "num", "sigma_error", "phi_error"),
    [(32, 16, 1e-9, 1e-9), (64, 24, 1e-6, 1e-6), (128, 24, 1e-8, 2e-8)],
)
def test_filters_equal_exact_arithmetic(seq_len, num, sigma_error, phi_error):
    sigma, phi = spectral_filters(seq_len, 24)
    np.testing.assert_allclose(sigma[:num], GOLDEN[f"sigma_{seq_len}"][:num], rtol=sigma_error)
    distance = np.linalg.norm(phi - GOLDEN[f"phi_{seq_len}"], axis=0)[:num]
    assert distance.max() < phi_error


@pytest.mark.parametrize(
    ("filters", "matrix"), [(spectral_filters, hankel), (alternative_filters, alternative_hankel)]
)
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
    # The Rayleigh quotient of an accurate vector is accurate in relative terms where `eigvalsh` is
    # not.
    sigma, phi = alternative_filters(40, 24)
    z = [
        [
            Fraction(8 * (1 + (-1) ** (i + j)), (i + j + 3) * (i + j - 1) * (i + j + 1))
            for j in range(1, 41)
        ]
        for i in range(1, 41)
    ]
    for k in (0, 11, 15):
        v = [Fraction(float(x)) for x in phi[:, k]]
        quotient = sum(v[i] * z[i][j] * v[j] for i in range(40) for j in range(40)) / sum(
            x * x for x in v
        )
        assert abs(float(quotient) / sigma[k] - 1) < 1e-9


def test_longest_task_never_holds_its_matrix():
    tracemalloc.start()
    sigma, phi = spectral_filters(16384, 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 16384**2 / 8
    np.testing.assert_allclose(phi.T @ phi, np.eye(24), atol=1e-12)
    n = np.arange(2.0, 16386)[None] + np.array([0, 1, 98, 16383])[:, None]
    np.testing.assert_allclose(
        2 / (n**3 - n) @ phi, phi[[0, 1, 98, 16383]] * sigma[None], atol=1e-14
    )


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
        (8, 24, r"model\.num_filters=24 exceeds task\.seq_len=8"),
        (0, 1, r"task\.seq_len=0"),
        (8, 0, r"model\.num_filters=0"),
    ],
)
def test_impossible_sizes_are_refused(filters, seq_len, num_filters, message):
    with pytest.raises(ValueError, match=message):
        filters(seq_len, num_filters)


FILTERS = {"hankel": spectral_filters, "alternative": alternative_filters}


def recurrence_error(kind, seq_len, num_filters, extra_states, dtype=np.float64):
    """The largest error of a filter: the root of its summed squares times sigma^(1/4)."""
    sigma, phi = FILTERS[kind](seq_len, num_filters)
    a, h = (x.astype(dtype) for x in filter_recurrence(kind, seq_len, num_filters, extra_states))
    found = np.zeros((seq_len, num_filters))
    for i in range(seq_len):
        found[i, : len(h)] = h[:num_filters]
        h = h @ a
    return (sigma**0.25 * np.linalg.norm(found - phi, axis=0)).max()


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        ("hankel", {0: 2e-4, 4: 1e-6, 8: 2e-9, 16: 1e-13, 24: 1e-13}),
        ("alternative", {0: 2e-2, 4: 1e-3, 8: 1e-4, 16: 1e-7, 24: 2e-10}),
    ],
)
def test_recurrence_errs_less_by_orders_with_every_few_states(kind, bounds):
    for extra, bound in bounds.items():
        assert recurrence_error(kind, 1024, 24, extra) < bound, extra


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILTERS)
def test_recurrence_serves_float32_and_the_longest_task(kind):
    assert recurrence_error(kind, 16384, 24, 24) < 1e-7
    assert recurrence_error(kind, 16384, 24, 24, np.float32) < 1e-6


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("num_filters", [1, 5, 24, 40])
def test_recurrence_of_any_size_fits_and_never_grows(kind, num_filters):
    """Eigenvectors that are noise stay out: with them some of these grow by half at every step."""
    for seq_len in (40, 44, 65, 67, 77, 100, 300):
        a, b = filter_recurrence(kind, seq_len, num_filters)
        assert a.shape == (len(b), len(b))
        assert len(b) <= min(seq_len, num_filters + 24)
        assert np.abs(np.linalg.eigvals(a)).max() < 1
        assert recurrence_error(kind, seq_len, num_filters, 24) < 4e-8


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 48])
def test_recurrence_of_full_size_is_exact(kind, seq_len):
    assert recurrence_error(kind, seq_len, min(seq_len, 24), 24) < 1e-13
