"""The spectral filters (fig1), the decay of their eigenvalues (spectrum), the theorems (theory)."""

from typing import Any

import numpy as np
from jaxtyping import Float

from lra.studies.figures import panels
from lra.studies.lds import least_squares_taps, random_symmetric
from lra.studies.output import Output
from models.lds_layers import stu_taps, with_feedback
from models.ops.filters import filter_recurrence, spectral_filters

DECAY = np.pi**2 / 4  # of the bound: sigma_k <= GAMMA exp(-DECAY k / log L)
GAMMA = 235_200.0
THEOREM_C = 2e6  # "c <= 2 x 10^6" of theorem 3.1
MEMORY_COLORS = {"input taps": "C1", "filters": "C0", "states of their recurrence": "C2"}
RESOLVED = 1e-25  # smaller eigenvalues are not computed to a relative precision


def fig1(length: int, filters: int) -> Output:
    """The leading filters: their first entries, and all entries over the logarithm of time."""
    sigma, phi = spectral_filters(length, filters)
    figure, axes = panels([f"first entries of the filters, L = {length:,}", "all entries"])
    time = np.arange(1, length + 1)
    for axis in axes:
        for k in range(filters):
            label = rf"$\phi_{{{k + 1}}}$, $\sigma$ = {sigma[k]:.1e}"
            axis.plot(time, phi[:, k], label=label, color=f"C{k}")
        axis.set(xlabel="entry i", ylabel=r"$\phi_k(i)$")
    axes[0].set_xlim(0, min(length, 60))
    axes[1].set_xscale("log")
    axes[1].legend()
    rows = [
        {"i": i + 1} | {f"phi_{k + 1}": phi[i, k] for k in range(filters)} for i in range(length)
    ]
    changes = [int(np.sum(np.diff(np.sign(phi[:, k])) != 0)) for k in range(filters)]
    numbers = {"sign changes of filter k": changes, "sigma": sigma.tolist()}
    return Output({"fig1": rows}, numbers, figure)


def spectrum(lengths: tuple[int, ...], filters: int, tolerances: tuple[float, ...]) -> Output:
    """sigma_k against the bound; the filters that an error of every mu(alpha) needs, over L."""
    figure, axes = panels(["eigenvalues and their bound", "filters that a tolerance needs"])
    rows, needs = [], []
    for color, length in enumerate(lengths):
        sigma, phi = spectral_filters(length, min(filters, length))
        k = np.arange(1, len(sigma) + 1)
        bound = GAMMA * np.exp(-DECAY * k / np.log(length))
        kept = sigma > RESOLVED
        axes[0].semilogy(k[kept], sigma[kept], ".-", color=f"C{color}", label=f"L = {length:,}")
        axes[0].semilogy(k, bound, "--", lw=1, color=f"C{color}")
        slope = -np.polyfit(k[kept][4:], np.log(sigma[kept][4:]), 1)[0] * np.log(length)
        rows += [
            {"L": length, "k": i, "sigma": s, "bound": b, "resolved": s > RESOLVED}
            for i, s, b in zip(k, sigma, bound, strict=True)
        ]
        errors = projection_errors(phi)
        need = {e: int(np.argmax(errors <= e)) if errors[-1] <= e else None for e in tolerances}
        constant = float(np.max(sigma[kept] * np.exp(DECAY * k[kept] / np.log(length))))
        needs.append(
            {"L": length, "decay * log L": slope, "constant that the bound needs": constant}
        )
        needs[-1] |= {f"K for {e:.0e}": need[e] for e in tolerances}
    axes[0].set(xlabel="k", ylabel=r"$\sigma_k$ (dashed: bound)", ylim=(1e-26, 1e7))
    axes[0].legend()
    for e in tolerances:
        axes[1].plot(
            lengths, [row[f"K for {e:.0e}"] for row in needs], "o-", label=f"error {e:.0e}"
        )
    axes[1].set(xscale="log", xlabel="L", ylabel="K", ylim=(0, 1.5 * filters))
    axes[1].set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes[1].set_xticks([], minor=True)
    axes[1].legend(
        ncols=2, loc="upper left", title=r"$\max_\alpha \|\mu(\alpha) - P_K \mu(\alpha)\|$"
    )
    numbers = {
        "largest sigma_k / bound": max(r["sigma"] / r["bound"] for r in rows if r["resolved"]),
        "decay of the bound * log L": DECAY,
        "measured decay * log L": [row["decay * log L"] for row in needs],
    }
    return Output({"spectrum": rows, "needs": needs}, numbers, figure)


def projection_errors(phi: Float[np.ndarray, "L K"]) -> Float[np.ndarray, " K_plus_1"]:
    """The largest |mu(alpha) - P mu(alpha)| over alpha in [0, 1], for the first 0..K filters."""
    mu = mus(len(phi))
    errors = [np.linalg.norm(mu, axis=0).max()]
    for k in range(phi.shape[1]):
        mu = mu - phi[:, k : k + 1] * (phi[:, k] @ mu)[None]
        errors.append(np.linalg.norm(mu, axis=0).max())
    return np.array(errors)


def mus(length: int, count: int = 120) -> Float[np.ndarray, "L A"]:
    """mu(alpha) = (1 - alpha) (1, alpha, alpha^2, ...) with gaps 1 - alpha from 1e-2 / L to 1."""
    gap = np.geomspace(1e-2 / length, 1, count)
    return gap * np.exp(np.arange(length)[:, None] * np.log1p(-np.minimum(gap, 1 - 1e-15)))


def theory(
    lengths: tuple[int, ...], filters: tuple[int, ...], systems: int, states: int, seed: int
) -> Output:
    """Theorem 3.1 (approximation), its lemmas, theorem 5.1 (autoregression) and the memory."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        found = [random_symmetric(rng, states, 3) for _ in range(systems)]
        taps = stu_taps(length, max(filters))
        for k in filters:
            columns = with_feedback(taps[:, : 3 + 2 * k])
            for number, system in enumerate(found):
                h = system.impulse_response(length)
                m, _ = least_squares_taps(columns, h)
                gap = h - np.einsum("lj,jio->lio", columns, m)
                # |y - y_SF| of the worst inputs with |u_t| <= 1
                worst = float(np.linalg.norm(gap, 2, axis=(1, 2)).sum() ** 2)
                col = (
                    np.linalg.norm(system.b, axis=0).max() * np.linalg.norm(system.c, axis=0).max()
                )
                bound = THEOREM_C * col * length**3 * np.exp(-DECAY * k / np.log(length))
                rows.append({"L": length, "K": k, "system": number, "error": worst, "bound": bound})
    figure, axes = panels(
        ["theorem 3.1: error of equation (4)", "memory that an error of 1e-3 needs"]
    )
    for number, length in enumerate(lengths):
        mine = [[r for r in rows if (r["L"], r["K"]) == (length, k)] for k in filters]
        worst_of = [max(r["error"] for r in some) for some in mine]
        least_of = [min(r["bound"] for r in some) for some in mine]
        axes[0].semilogy(filters, worst_of, "o-", color=f"C{number}", label=f"L = {length:,}")
        axes[0].semilogy(filters, least_of, "--", color=f"C{number}", lw=1)
    axes[0].set(xlabel="K", ylabel="worst squared error (dashed: bound)")
    axes[0].legend()
    memory = memory_rows(max(lengths), 1e-3)
    gaps = [row["delta"] for row in memory]
    for key, color in MEMORY_COLORS.items():
        axes[1].loglog(gaps, [row[key] for row in memory], "o-", color=color, label=key)
    axes[1].axhline(max(lengths), color="0.5", lw=1, ls=":", label="L")
    axes[1].set(xlabel=r"spectral gap $\delta$", ylabel="numbers held for each input")
    axes[1].invert_xaxis()
    axes[1].legend()
    return Output({"theory": rows, "memory": memory}, lemma_numbers(lengths, rows, rng), figure)


def lemma_numbers(
    lengths: tuple[int, ...], rows: list[dict[str, Any]], rng: np.random.Generator
) -> dict[str, Any]:
    """The largest ratio of each left side to its right side: an inequality holds up to 1."""
    eigenvalue, inner = 0.0, 0.0
    for length in lengths:
        sigma, phi = spectral_filters(length, 30)
        kept = sigma > RESOLVED
        bound = GAMMA * np.exp(-DECAY * np.arange(1, 31) / np.log(length))
        eigenvalue = max(eigenvalue, float((sigma / bound)[kept].max()))
        largest = np.abs(phi.T @ mus(length)).max(1)
        inner = max(inner, float((largest / (6 * sigma) ** 0.25)[kept].max()))
    return {
        "sigma_k / bound, largest": eigenvalue,
        "|<phi_k, mu(alpha)>| / (6 sigma_k)^(1/4), largest": inner,
        "theorem 3.1, error / bound, largest": max(r["error"] / r["bound"] for r in rows),
        "theorem 5.1, relative error of an AR model of order d": ar_error(rng, 4, 256),
    }


def ar_error(rng: np.random.Generator, states: int, length: int) -> float:
    """Largest relative error of order-d autoregression, with the true past, on an LDS of size d.

    y_t + sum_i a_i y_{t-i} = sum_{i=0..d} u_{t-i} M_i, where a are the coefficients of the
    characteristic polynomial of A.
    """
    system = random_symmetric(rng, states, 3)
    u = rng.normal(size=(length, 3))
    y, h = system.outputs(u), system.impulse_response(states + 1)
    a = np.poly(system.lam)
    m = [sum(a[j] * h[i - j] for j in range(i + 1)) for i in range(states + 1)]
    t = np.arange(states, length)
    predicted = sum(u[t - i] @ m[i] for i in range(states + 1))
    predicted = predicted - sum(a[i] * y[t - i] for i in range(1, states + 1))
    return float(np.abs(predicted - y[t]).max() / np.abs(y).max())


def memory_rows(length: int, tolerance: float) -> list[dict[str, Any]]:
    """Input taps, filters and states that (1 - delta)^i, i < L, needs for a relative error."""
    rows = []
    _, phi = spectral_filters(length, 40)
    for delta in 10.0 ** -np.arange(1, 6):
        h = (1 - delta) ** np.arange(length)
        size = np.sum(h**2)
        tail = np.cumsum((h**2)[::-1])[::-1]  # of taps i and later
        needed = np.flatnonzero(tail <= tolerance**2 * size)
        rest, k = h.copy(), 0
        while np.linalg.norm(rest) > tolerance * size**0.5:
            rest, k = rest - phi[:, k] * (phi[:, k] @ rest), k + 1
        states = len(filter_recurrence("hankel", length, k)[1])
        theory = np.log(1 / tolerance) / delta
        row = {"delta": delta, "input taps": int(needed[0]) if len(needed) else length}
        rows.append(
            row
            | {"log(1/error) / delta": theory, "filters": k, "states of their recurrence": states}
        )
    return rows
