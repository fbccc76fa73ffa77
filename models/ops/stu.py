"""Computes the output of a spectral transform unit (STU) without K filtered copies of its input.

Paper: Agarwal, Suo, Chen, Hazan, "Spectral State Space Models", arXiv 2312.06837: equation (4) is
`m_y=1.0, lag=2`, equation (5) one learned matrix and `lag=2`, equation (6) k_y of them and `lag=1`.
Reference code read: google-deepmind/spectral_ssm, to whose values the tests compare.

All terms except a learned feedback are one causal convolution with matrix-valued taps, sum_j
basis_j(i) m_j; the basis consists of the filters, the sign-alternated filters and one unit impulse
per m_u, after the fixed feedback if there is one. The published order convolves with each basis
element before multiplying by its matrix, and holds (B, L, K, D). Here the order is swapped: at each
frequency first G = sum_j basis_j m_j, then Y = U G. The published order, one basis element at a
time, serves only a batch of one or two wide sequences. Complex products are written as real ones,
several times faster on XLA:CPU.

Interpretation: the paper's feature sum runs over i = 0..t-1, u_1 is the first input, and the index
of the first entry of phi_k is not stated. Here, as in the published code, phi_k(i) is entry i
counted from 0, so that U_t depends on u_t, and y_t depends through the filters on inputs up to
u_{t-2}. Deviations: none in the values.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.ops.batch_sharding import shard_over_batch
from models.ops.blocks import merge_blocks, split_blocks
from models.ops.fft_convolution import smooth_size
from models.ops.recurrence import linear_recurrence

# for products that feed the next step: the rounding errors of tf32 would accumulate over L steps
HIGHEST = lax.Precision.HIGHEST
# in a block: each block reads all of m, which takes longer than the products if there are fewer
_FEWEST_FREQUENCIES = 32


def stu(
    u: Float[Array, "B L D_in"],
    phi: Float[Array, "L_phi K"] | Float[np.ndarray, "L_phi K"],
    sigma: Float[Array, " K"] | Float[np.ndarray, " K"],
    m_u: Float[Array, "k_u D_in D_out"],
    m_plus: Float[Array, "K D_in D_out"],
    m_minus: Float[Array, "K D_in D_out"] | None = None,
    m_y: Float[Array, "k_y D_out D_out"] | float | None = None,
    lag: int = 1,
    mix: Float[Array, "J J"] | None = None,
) -> Float[Array, "B L D_out"]:
    """The output of an STU, equations (4) to (6).

    y_t = feedback + sum_i u_{t-i} m_u[i]
          + sum_k sigma_k^(1/4) (U+_{t-2,k} m_plus[k] + U-_{t-2,k} m_minus[k])

    Vectors are rows and multiply matrices from the left. With times counted from 0, U+_{t,k} =
    sum_{i=0..t} u_{t-i} phi[i, k]; U- has the extra factor (-1)^i. Inputs, features and outputs
    before time 0 are zero. Gradients are exact; forward mode (`jax.jvp`) is not supported. The
    transforms mix all times: errors of y_t are about 1e-6 of the largest output in float32, 2e-4
    with products in tf32, 1e-2 in bfloat16, so inputs after the end of a sequence should be zero.

    Args:
        phi: filters as columns, in any order and of any sign; rows beyond L are not used.
        sigma: eigenvalues of the filters, positive.
        m_minus: None omits the sign-alternated filters, as the published CIFAR code does.
        m_y: None for no feedback; a number adds m_y y_{t-lag}; an array adds sum_j y_{t-lag(1+j)}
            m_y[j].
        mix: replaces the J matrices in the order m_plus, m_minus, m_u by these combinations of
            them. It is applied to the basis, so that matrices that cancel are never rounded.
    Returns:
        y in the dtype of u. With bfloat16 inputs the products have bfloat16 factors and float32
        sums; all else is float32.
    Raises:
        ValueError: `phi` is shorter than u.
    """
    length = u.shape[1]
    if phi.shape[0] < length:
        raise ValueError(
            f"the filters have length {phi.shape[0]} and the input {length}; "
            f"set task.seq_len to {length} or more"
        )
    # Explicit dtypes: NumPy filters are float64, and strict promotion refuses even `promote_types`.
    dtype = jnp.float64 if u.dtype == jnp.float64 else jnp.float32
    phi, sigma = jnp.asarray(phi, dtype), jnp.asarray(sigma, dtype)
    filters, matrices = phi[:length] * (sigma**0.25)[None], [m_plus, m_u]
    if m_minus is not None:
        signs = jnp.asarray(1 - 2 * (np.arange(length) % 2), dtype)
        filters = jnp.concatenate([filters, filters * signs[:, None]], axis=1)
        matrices = [m_plus, m_minus, m_u]
    # a lag of 2, not as a phase, which would wrap the last inputs onto the first outputs
    delayed = jnp.pad(filters, ((2, 0), (0, 0)))[:length]
    basis = jnp.concatenate([delayed, jnp.eye(length, len(m_u), dtype=dtype)], axis=1)
    learned = None
    if isinstance(m_y, float | int):  # acts on the basis, which is far smaller than y
        basis = scalar_feedback(basis[None], float(m_y), lag)[0]
    else:
        learned = m_y
    if mix is not None:
        basis = jnp.matmul(basis, mix.astype(dtype), precision=HIGHEST)
    products = jnp.bfloat16 if u.dtype == jnp.bfloat16 else dtype
    convolution = partial(causal_convolution, products=products)
    wide, m = u.astype(dtype), jnp.concatenate([m.astype(dtype) for m in matrices])
    y = shard_over_batch(convolution, wide, basis, m)
    if learned is not None:
        y = merge_lags(feedback(split_lags(y, lag), learned.astype(dtype)), lag, length)
    return y.astype(u.dtype)


def feature_moments(
    phi: Float[np.ndarray, "L K"],
    sigma: Float[np.ndarray, " K"],
    k_u: int,
    negative_filters: bool,
    alpha: float,
    lag: int,
) -> Float[np.ndarray, "J J"]:
    """Second moments of the features for white input of unit variance, averaged over the L times.

    C = sum_i w_i b_i b_i^T with w_i = (L - i) / L, where b_i (J,) are the values at lag i of the
    filters with sigma^(1/4), of the filters with signs, and of the k_u unit impulses, in the order
    m_plus, m_minus, m_u.

    Args:
        alpha, lag: the feedback alpha y_{t-lag}, which the features pass through as well.
    """
    length = len(phi)
    filters = np.asarray(phi, np.float64) * np.asarray(sigma, np.float64) ** 0.25
    if negative_filters:
        filters = np.concatenate([filters, filters * (1 - 2 * (np.arange(length) % 2))[:, None]], 1)
    delayed = np.concatenate([np.zeros((2, filters.shape[1])), filters])[:length]
    basis = np.concatenate([delayed, np.eye(length, k_u)], axis=1)
    for i in range(lag, length if alpha else 0):
        basis[i] += alpha * basis[i - lag]
    weights = 1 - np.arange(length) / length
    return (basis * weights[:, None]).T @ basis


def inverse_power(
    moments: Float[np.ndarray, "J J"], power: float, floor: float = 1e-4
) -> Float[np.ndarray, "J J"]:
    """moments^(-power); eigenvalues are at least `floor` times the largest one."""
    values, vectors = np.linalg.eigh(moments)
    values = np.maximum(values, floor * values[-1])
    return (vectors * values**-power) @ vectors.T


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_convolution(
    u: Float[Array, "B L D_in"],
    basis: Float[Array, "L J"],
    m: Float[Array, "J D_in D_out"],
    products: Any = None,
) -> Float[Array, "B L D_out"]:
    """y_t = sum_j sum_{i=0..t} basis[i, j] u_{t-i} m[j].

    The backward pass saves only u, basis and m and recomputes their transforms and G. All arguments
    share one dtype, float32 or float64.

    Args:
        products: dtype to which the factors of matrix products are rounded; None for their own.
    """
    order = _each_basis_element if basis_first(*u.shape[:2], *m.shape[::2]) else _each_frequency
    return order(u, basis, m, products)


def _convolution_forward(
    u: Array, basis: Array, m: Array, products: Any
) -> tuple[Array, tuple[Array, Array, Array]]:
    return causal_convolution(u, basis, m, products), (u, basis, m)


def _convolution_backward(
    products: Any, saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, Array]:
    u, basis, m = saved
    first = basis_first(*u.shape[:2], *m.shape[::2])
    order = _each_basis_element_backward if first else _each_frequency_backward
    return order(u, basis, m, dy, products)


causal_convolution.defvjp(_convolution_forward, _convolution_backward)


def basis_first(batch: int, length: int, num: int, d_out: int) -> bool:
    """Whether the published order is cheaper than one matrix per frequency.

    Compares operations per input channel and time step; one operation of a transform takes as long
    as five of a product on a CPU (measured at B = 1 and 2, D = 128 to 512).
    """
    transform = 5 * 5 * math.log2(2 * length)
    return batch * num * (2 * d_out + transform) < (8 * batch + 4 * num) * d_out


def _multiply(spec: str, left: Array, right: Array, products: Any) -> Array:
    """An einsum with factors rounded to `products` and sums in the dtype of `left`."""
    if products is None or products == left.dtype:
        return jnp.einsum(spec, left, right)
    return jnp.einsum(
        spec, left.astype(products), right.astype(products), preferred_element_type=left.dtype
    )


def _each_basis_element(u: Array, basis: Array, m: Array, products: Any) -> Array:
    """The published order, one basis element at a time."""
    length = u.shape[1]
    size = smooth_size(2 * length - 1)
    u_hat = _spectrum(u, size)

    def add(y: Array, element: tuple[Array, Array]) -> tuple[Array, None]:
        filter_hat, matrix = element
        features = jnp.fft.irfft(u_hat * filter_hat, size)[..., :length]
        return y + _multiply("bdl,do->blo", features, matrix, products), None

    basis_hat = _spectrum(basis[None], size)[0]
    return lax.scan(add, jnp.zeros((*u.shape[:2], m.shape[2]), u.dtype), (basis_hat, m))[0]


def _each_basis_element_backward(
    u: Array, basis: Array, m: Array, dy: Array, products: Any
) -> tuple[Array, Array, Array]:
    length = u.shape[1]
    size = smooth_size(2 * length - 1)
    u_hat = _spectrum(u, size)

    def add(du_hat: Array, element: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        filter_hat, matrix = element
        features = jnp.fft.irfft(u_hat * filter_hat, size)[..., :length]
        dm = _multiply("bdl,blo->do", features, dy, products)
        dfeatures_hat = jnp.fft.rfft(_multiply("blo,do->bdl", dy, matrix, products), size)
        dfilter = jnp.fft.irfft(jnp.sum(dfeatures_hat * u_hat.conj(), axis=(0, 1)), size)[:length]
        return du_hat + dfeatures_hat * filter_hat.conj(), (dfilter, dm)

    basis_hat = _spectrum(basis[None], size)[0]
    du_hat, (dbasis, dm) = lax.scan(add, jnp.zeros_like(u_hat), (basis_hat, m))
    return _signal(du_hat, size, length), dbasis.T, dm


def _each_frequency(u: Array, basis: Array, m: Array, products: Any) -> Array:
    """One matrix G per frequency, a block of frequencies at a time."""
    length = u.shape[1]
    size = smooth_size(2 * length - 1)

    def block(spectra: list[Array], outputs: list[Array], at: Any, width: int) -> list[Array]:
        u_part, basis_part = (_read(x, at, width) for x in spectra)
        return [_write(outputs[0], _product(u_part, basis_part, m, products), at)]

    spectra = [_spectrum(u, size), _spectrum(basis[None], size)]
    outputs = [jnp.zeros((u.shape[0], m.shape[2], size // 2 + 1), spectra[0].dtype)]
    return _signal(_over_blocks(block, spectra, outputs, m)[0], size, length)


def _each_frequency_backward(
    u: Array, basis: Array, m: Array, dy: Array, products: Any
) -> tuple[Array, Array, Array]:
    length = u.shape[1]
    size = smooth_size(2 * length - 1)
    m_transposed = jnp.swapaxes(m, 1, 2)
    conjugate = jnp.asarray([1, -1], u.dtype)[None, :, None, None]

    def block(spectra: list[Array], outputs: list[Array], at: Any, width: int) -> list[Array]:
        u_part, dy_part, basis_part = (_read(x, at, width) for x in spectra)
        du, dbasis, dm = outputs
        # dY G^H: a correlation
        du_part = _product(dy_part, basis_part * conjugate, m_transposed, products)
        dg = _outer_product(u_part, dy_part, products)  # (f, 2, D_in, D_out)
        dbasis_part = _multiply("frdo,jdo->frj", dg, m, products)[:, :, None]
        # All frequencies except the first and the last also represent their conjugates.
        index = at + jnp.arange(width)
        weight = jnp.where((index == 0) | (index == size // 2), 1, 2).astype(m.dtype) / size
        weighted = basis_part[:, :, 0] * weight[:, None, None]
        dm = dm + _multiply("frj,frdo->jdo", weighted, dg, products)
        return [_write(du, du_part, at), _write(dbasis, dbasis_part, at), dm]

    spectra = [_spectrum(u, size), _spectrum(dy, size), _spectrum(basis[None], size)]
    outputs = [jnp.zeros_like(spectra[0]), jnp.zeros_like(spectra[2]), jnp.zeros_like(m)]
    du, dbasis, dm = _over_blocks(block, spectra, outputs, m)
    return _signal(du, size, length), _signal(dbasis, size, length)[0], dm


def _over_blocks(
    block: Callable[..., list[Array]], spectra: list[Array], outputs: list[Array], m: Array
) -> list[Array]:
    """Runs `block` over all frequencies, as many at a time as `_block_bytes` of G allow (>= 32)."""
    width = max(_block_bytes() // (2 * m.nbytes // len(m)), _FEWEST_FREQUENCIES)
    whole, rest = divmod(spectra[0].shape[2], width)
    if whole:
        outputs = lax.fori_loop(
            0, whole, lambda i, out: block(spectra, out, i * width, width), outputs
        )
    return block(spectra, outputs, whole * width, rest) if rest else outputs


def _block_bytes() -> int:
    """Size of a block: fits the cache of a CPU; outweighs a kernel launch elsewhere."""
    return 2**21 if jax.default_backend() == "cpu" else 2**28


def _product(u: Array, basis: Array, m: Array, products: Any) -> Array:
    """Y = U G of a block of frequencies: (f, 2, B, D_in) and (f, 2, 1, J) to (f, 2, B, D_out)."""
    width, _, batch, d_in = u.shape
    rows, matrix = u.reshape(width, 2 * batch, d_in), m.reshape(m.shape[0], -1)

    def rows_times(part: int) -> Array:
        g = _multiply("fj,jx->fx", basis[:, part, 0], matrix, products).reshape(width, d_in, -1)
        return _multiply("fbd,fdo->fbo", rows, g, products).reshape(width, 2, batch, -1)

    by_real, by_imag = rows_times(0), rows_times(1)
    return jnp.stack([by_real[:, 0] - by_imag[:, 1], by_real[:, 1] + by_imag[:, 0]], axis=1)


def _outer_product(u: Array, dy: Array, products: Any) -> Array:
    """U^H dY, the gradient of G: (f, 2, B, D_in) and (f, 2, B, D_out) to (f, 2, D_in, D_out)."""
    width, _, batch, d_in = u.shape
    rows = u.reshape(width, 2 * batch, d_in)
    turned = jnp.stack([dy[:, 1], -dy[:, 0]], axis=1)
    parts = [
        _multiply("fbd,fbo->fdo", rows, x.reshape(width, 2 * batch, -1), products)
        for x in (dy, turned)
    ]
    return jnp.stack(parts, axis=1)


def _spectrum(x: Array, size: int) -> Array:
    """(B, L, D) to complex (B, D, F)."""
    return jnp.fft.rfft(jnp.swapaxes(x, 1, 2), size)


def _signal(spectrum: Array, size: int, length: int) -> Array:
    return jnp.swapaxes(jnp.fft.irfft(spectrum, size)[..., :length], 1, 2)


def _read(spectrum: Array, at: Any, width: int) -> Array:
    """A block of frequencies as (f, 2, B, D), real and imaginary parts on axis 1."""
    # transposed by blocks: transposing whole spectra takes XLA:CPU longer than the transforms
    part = lax.dynamic_slice_in_dim(spectrum, at, width, axis=2)
    return jnp.transpose(jnp.stack([part.real, part.imag]), (3, 0, 1, 2))


def _write(spectrum: Array, part: Array, at: Any) -> Array:
    turned = jnp.transpose(part, (1, 2, 3, 0))
    return lax.dynamic_update_slice_in_dim(spectrum, lax.complex(turned[0], turned[1]), at, axis=2)


def scalar_feedback(x: Float[Array, "B L D"], alpha: float, lag: int) -> Float[Array, "B L D"]:
    """y_t = x_t + alpha y_{t-lag}, as a recurrence over every `lag`-th step."""
    batch, length, width = x.shape
    rows = split_blocks(x, lag).reshape(batch, -1, lag * width)
    if alpha == 1:
        rows = jnp.cumsum(rows, axis=1)
    elif alpha != 0:
        rows = linear_recurrence(jnp.full(lag * width, alpha, x.dtype), rows)
    return rows.reshape(batch, -1, width)[:, :length]


def split_lags(x: Float[Array, "B L D"], lag: int) -> Float[Array, "B_lag T D"]:
    """Every `lag`-th step of each sequence as a sequence of its own; zeros fill the last ones."""
    rows = jnp.swapaxes(split_blocks(x, lag), 1, 2)  # (B, lag, T, D)
    return rows.reshape(-1, *rows.shape[2:])


def merge_lags(x: Float[Array, "B_lag T D"], lag: int, length: int) -> Float[Array, "B L D"]:
    """The inverse of `split_lags`: the first `length` steps."""
    return merge_blocks(jnp.swapaxes(x.reshape(-1, lag, *x.shape[1:]), 1, 2), length)


@jax.custom_vjp
def feedback(x: Float[Array, "B L D"], m_y: Float[Array, "k_y D D"]) -> Float[Array, "B L D"]:
    """y_t = x_t + sum_j y_{t-1-j} m_y[j].

    Computed step by step on a CPU, in about sqrt(L) dependent steps elsewhere.
    """
    m_y = m_y[: x.shape[1] - 1]  # outputs before time 0 are zero
    if m_y.shape[0] == 0:
        return x
    return lax.platform_dependent(x, m_y, cpu=feedback_by_steps, default=feedback_by_chunks)


def _feedback_forward(x: Array, m_y: Array) -> tuple[Array, tuple[Array, Array]]:
    y = feedback(x, m_y)
    return y, (y, m_y)


def _feedback_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    y, m_y = saved
    taps, length = m_y.shape[0], y.shape[1]
    dx = jnp.flip(feedback(jnp.flip(dy, 1), jnp.swapaxes(m_y, 1, 2)), 1)
    past = jnp.pad(y, ((0, 0), (taps, 0), (0, 0)))

    def gradient(tap: Array) -> Array:
        delayed = lax.dynamic_slice_in_dim(past, taps - 1 - tap, length, axis=1)  # y_{t-1-tap}
        return jnp.einsum("bld,ble->de", delayed, dx)

    return dx, lax.map(gradient, jnp.arange(taps))


feedback.defvjp(_feedback_forward, _feedback_backward)


def feedback_by_steps(
    x: Float[Array, "B L D"], m_y: Float[Array, "k_y D D"]
) -> Float[Array, "B L D"]:
    """`feedback`, step by step."""
    batch, length, width = x.shape
    taps = m_y.shape[0]
    stacked = m_y.reshape(taps * width, width)

    # not `lax.scan`, which would transpose x and y to have time in front
    def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        past, y = carry  # past: (B, k_y D), the latest output first
        x_t = lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)
        y_t = x_t + jnp.matmul(past, stacked, precision=HIGHEST)
        past = jnp.concatenate([y_t, past[:, : (taps - 1) * width]], axis=1)
        return past, lax.dynamic_update_index_in_dim(y, y_t, t, axis=1)

    start = jnp.zeros((batch, taps * width), x.dtype)
    return lax.fori_loop(0, length, step, (start, jnp.zeros_like(x)))[1]


def feedback_by_chunks(
    x: Float[Array, "B L D"], m_y: Float[Array, "k_y D D"]
) -> Float[Array, "B L D"]:
    """`feedback` in chunks of about sqrt(L) steps that run in parallel from a zero past.

    Pairs of chunks are merged into chunks of twice the length until about sqrt(L) chunks are left;
    a scan over these adds the contributions of their true pasts, through the impulse response h,
    which is computed as one more chunk per output. This takes 2.5 to 4.5 times the operations of
    the step-by-step form, as matrix products, and k_y T D^2 numbers for the responses W.
    """
    batch, length, width = x.shape
    taps = m_y.shape[0]
    chunk = _chunk_length(length, taps, width)
    chunks = -(-length // chunk)
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), (0, 0)))
    x = x.reshape(batch * chunks, chunk, width)
    impulse = jnp.zeros((width, chunk, width), x.dtype).at[:, 0].set(jnp.eye(width, dtype=x.dtype))
    rows = jnp.concatenate([x, impulse])
    size = 1
    while size < chunk:
        reach = min(taps, size)
        w = _responses(m_y, rows[batch * chunks :, :size])[:reach]
        pairs = rows.reshape(len(rows), -1, 2, size, width)
        ends = pairs[:, :, 0, size - 1 - np.arange(reach)]  # the latest first, here and below
        late = pairs[:, :, 1] + jnp.einsum("rckd,kdte->rcte", ends, w, precision=HIGHEST)
        rows = jnp.stack([pairs[:, :, 0], late], axis=2).reshape(rows.shape)
        size *= 2
    alone = rows[: batch * chunks].reshape(batch, chunks, chunk, width)
    w = _responses(m_y, rows[batch * chunks :])

    latest_first = chunk - 1 - np.arange(taps)
    ends = jnp.swapaxes(alone[:, :, latest_first], 0, 1).reshape(chunks, batch, taps * width)
    onward = w[:, :, latest_first].reshape(taps * width, taps * width)

    def pass_on(past: Array, end: Array) -> tuple[Array, Array]:
        return end + jnp.matmul(past, onward, precision=HIGHEST), past

    _, pasts = lax.scan(pass_on, jnp.zeros_like(ends[0]), ends)
    pasts = pasts.reshape(chunks, batch, taps, width)
    added = jnp.einsum("cbkd,kdte->bcte", pasts, w, precision=HIGHEST)
    return merge_blocks(alone + added, length)


def _responses(m_y: Float[Array, "k_y D D"], h: Float[Array, "D T D"]) -> Float[Array, "k_y D T D"]:
    """W[j, :, t], the contribution of an output j + 1 steps before a chunk to its output t.

    It enters through tap j at time 0, tap j + 1 at time 1, ...: W[j, t] = sum_i m_y[j + i] h_{t-i}.
    This is the sum of a diagonal of products that ends at (j, t), computed by doubling.
    """
    w = jnp.einsum("kde,etf->kdtf", m_y, h, precision=HIGHEST)
    step = 1
    while step < min(w.shape[0], w.shape[2]):
        w = w.at[:-step, :, step:].add(w[step:, :, :-step])
        step *= 2
    return w


def _chunk_length(length: int, taps: int, width: int) -> int:
    """A power of two near sqrt(L), at least k_y; W has 2^27 numbers or what k_y needs."""
    wanted = max(taps, min(math.isqrt(length - 1) + 1, 2**27 // (taps * width * width)))
    return 1 << (wanted - 1).bit_length()
