"""Cases of `lra bench ops` and `lra bench trainer`.

A case of `lra bench ops` is an operation of `models/` and, for most, the same mathematics in the
order of its paper's code.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Complex, Float

from models.backbone import Backbone
from models.mixer import Mask, Sequences
from models.ops.attention import Heads, attention
from models.ops.filters import spectral_filters, uncached_spectral_filters
from models.ops.recurrence import linear_recurrence
from models.ops.stu import feedback, stu
from models.stu import STU


class Case(NamedTuple):
    """One layer, forward and backward: `ours(*learned, *constants)` against `published`."""

    what: str
    published: Callable[..., Array] | None  # None: only ours is measured
    ours: Callable[..., Array]
    learned: tuple[Any, ...]  # differentiated arguments
    constants: tuple[Any, ...] = ()
    speed_goal: str = ""
    memory_goal: str = ""


class HostCase(NamedTuple):
    """A computation on the host. The benchmark times one call."""

    what: str
    call: Callable[[], Any]
    goal: str


def cases(platform: str) -> Iterator[Case | HostCase]:
    """Yields the cases for a JAX platform; an accelerator's are larger than the CPU's."""
    yield HostCase(
        "spectral filters, L=16,384 K=24, not cached",
        lambda: uncached_spectral_filters(16_384, 24),
        "< 3 s",
    )
    if platform == "cpu":
        yield stu_case(16, 1024, 128, k_y=2, speed_goal=">= 6 x", memory_goal="<= 0.25 x")
        yield stu_case(16, 1024, 128, k_y=32)
        yield stu_case(1, 1024, 512, k_y=2)
        yield recurrence_case(16, 2048, 256, speed_goal=">= 1.5 x")
        yield feedback_case(16, 1024, 128, k_y=2)
        yield feedback_case(16, 1024, 128, k_y=32)
        yield attention_case(8, 1024, 8, 16)
        return
    yield stu_case(48, 1024, 256, k_y=2, speed_goal=">= 10 x")
    yield stu_case(48, 1024, 256, k_y=32)
    yield stu_case(1, 1024, 512, k_y=2)
    yield recurrence_case(50, 1024, 384, speed_goal=">= 3 x")
    yield recurrence_case(32, 16_384, 256, speed_goal=">= 3 x")
    yield feedback_case(48, 1024, 256, k_y=2)
    yield feedback_case(48, 1024, 256, k_y=32)
    yield attention_case(8, 4096, 8, 64)
    yield path_x_case()


def stu_case(
    batch: int,
    length: int,
    width: int,
    *,
    k_y: int,
    num_filters: int = 24,
    speed_goal: str = "",
    memory_goal: str = "",
) -> Case:
    """Equation (6) of arXiv 2312.06837 with U+ and U-."""
    sigma, phi = spectral_filters(length, num_filters)
    draw = np.random.default_rng(0).normal
    learned = (
        draw(size=(batch, length, width)),
        draw(size=(3, width, width)) / width**0.5,
        draw(size=(num_filters, width, width)) / width**0.5,
        draw(size=(num_filters, width, width)) / width**0.5,
        draw(size=(k_y, width, width)) / (4 * k_y * width**0.5),
    )

    def ours(u, m_u, m_plus, m_minus, m_y, phi, sigma):
        return stu(u, phi, sigma, m_u, m_plus, m_minus, m_y)

    what = f"STU, B={batch} L={length:,} D={width} K={num_filters} k_y={k_y}"
    arrays = _float32(learned), _float32((phi, sigma))
    return Case(what, published_stu, ours, *arrays, speed_goal, memory_goal)


def published_stu(
    u: Sequences,
    m_u: Float[Array, "k_u D D"],
    m_plus: Float[Array, "K D D"],
    m_minus: Float[Array, "K D D"],
    m_y: Float[Array, "k_y D D"],
    phi: Float[Array, "L K"],
    sigma: Float[Array, " K"],
) -> Sequences:
    """The order of google-deepmind/spectral_ssm: all K filtered copies of the input at once."""
    length = u.shape[1]
    size = 1 << (2 * length - 1).bit_length()
    signs = jnp.asarray(1 - 2 * (np.arange(length) % 2), u.dtype)

    def filtered(filters: Array) -> Array:
        filters_hat = jnp.fft.rfft(filters, size, axis=0)[None, :, :, None]
        spectrum = jnp.fft.rfft(u, size, axis=1)[:, :, None] * filters_hat
        features = jnp.fft.irfft(spectrum, size, axis=1)[:, :length]
        features = features * (sigma**0.25)[None, None, :, None]
        return jnp.pad(features, ((0, 0), (2, 0), (0, 0), (0, 0)))[:, :length]  # (B, L, K, D)

    x = jnp.einsum("blkd,kde->ble", filtered(phi), m_plus)
    x = x + jnp.einsum("blkd,kde->ble", filtered(phi * signs[:, None]), m_minus)
    for lag, matrix in enumerate(m_u):
        x = x + jnp.pad(u, ((0, 0), (lag, 0), (0, 0)))[:, :length] @ matrix
    return published_feedback(x, m_y)


def feedback_case(batch: int, length: int, width: int, *, k_y: int) -> Case:
    draw = np.random.default_rng(0).normal
    learned = (
        draw(size=(batch, length, width)),
        draw(size=(k_y, width, width)) / (4 * k_y * width**0.5),
    )
    what = f"feedback, B={batch} L={length:,} D={width} k_y={k_y}"
    return Case(what, published_feedback, feedback, _float32(learned))


def published_feedback(x: Sequences, m_y: Float[Array, "k_y D D"]) -> Sequences:
    """y_t = x_t + sum_j y_{t-1-j} m_y[j], as a scan over time."""

    def step(past: Array, x_t: Array) -> tuple[Array, Array]:
        y_t = x_t + jnp.einsum("bkd,kde->be", past, m_y)
        return jnp.concatenate([y_t[:, None], past[:, :-1]], axis=1), y_t

    start = jnp.zeros((x.shape[0], *m_y.shape[:2]), x.dtype)
    return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)


def recurrence_case(batch: int, length: int, states: int, *, speed_goal: str = "") -> Case:
    rng = np.random.default_rng(0)
    lam = rng.uniform(0.9, 0.999, states) * np.exp(1j * rng.uniform(0, 6, states))
    bu = rng.normal(size=(batch, length, states)) + 1j * rng.normal(size=(batch, length, states))
    learned = jnp.asarray(lam, jnp.complex64), jnp.asarray(bu, jnp.complex64)
    what = f"complex recurrence, B={batch} L={length:,} N={states}"
    return Case(what, published_recurrence, linear_recurrence, learned, speed_goal=speed_goal)


def published_recurrence(
    lam: Complex[Array, " N"], bu: Complex[Array, "B L N"]
) -> Complex[Array, "B L N"]:
    """The order of NicolasZucchet/minimal-LRU: associative_scan over pairs, vmap over B."""
    decays = jnp.broadcast_to(lam[None], bu.shape[1:])

    def combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.vmap(lambda row: lax.associative_scan(combine, (decays, row))[1])(bu)


def attention_case(batch: int, length: int, heads: int, head_width: int) -> Case:
    draw = np.random.default_rng(0).normal
    learned = _float32(tuple(draw(size=(batch, length, heads, head_width)) for _ in "qkv"))
    mask = jnp.arange(length)[None] < np.linspace(length // 2, length, batch, dtype=int)[:, None]
    what = f"attention, B={batch} L={length:,} H={heads} W={head_width}"
    return Case(what, materialized_attention, partial(attention, causal=False), learned, (mask,))


def materialized_attention(q: Heads, k: Heads, v: Heads, mask: Mask) -> Heads:
    """Attention that materializes the (B, H, L, L) weights."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])


def path_x_case(batch: int = 32, length: int = 16_384, width: int = 128, depth: int = 6) -> Case:
    """An STU classifier at the LRU paper's Path-X sizes, without rematerialization."""
    mixer = partial(
        STU,
        num_filters=24,
        filters="hankel",
        k_u=3,
        k_y=None,
        negative_filters=True,
        init_m_u="zeros",
        bidirectional=False,
    )
    model = Backbone(
        mixer,
        num_classes=2,
        seq_len=length,
        vocab_size=None,
        depth=depth,
        width=width,
        norm="batch",
        norm_position="pre",
        norm_momentum=0.9,
        final_norm=False,
        activation="gelu",
        glu="full",
        mlp="none",
        mlp_ratio=4,
        dropout=0.0,
        pool="mean",
        positions="none",
        rngs=nnx.Rngs(params=jax.random.key(0)),
    )
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, 1)), jnp.float32)

    def logits(params: Any, rest: list[Any], inputs: Array) -> Array:
        model = nnx.merge(graph, params, *rest, copy=True)
        return model(inputs, jnp.full(batch, length), train=True)

    what = f"STU classifier, B={batch} L={length:,} D={width} depth {depth}"
    return Case(what, None, logits, (params,), (rest, inputs), memory_goal="<= 40 GB")


def _float32(arrays: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


class TrainerCase(NamedTuple):
    """A training of `lra bench trainer`: `lra train` overrides and steps per round."""

    what: str
    overrides: tuple[str, ...]
    steps: int


def trainer_cases(platform: str) -> list[TrainerCase]:
    """Returns a case of very short steps, where host overhead shows, and cases of usual size."""
    lru, stu = ("task=listops_short", "model=lru"), ("task=listops_short", "model=stu")
    if platform == "cpu":
        tiny = ("backbone.width=16", "backbone.depth=2", "task.max_length=127")
        return [
            TrainerCase("LRU, short steps", (*lru, *tiny, "trainer.batch_size=8"), 600),
            TrainerCase("LRU", (*lru, "trainer.batch_size=16"), 120),
            TrainerCase("STU", (*stu, "trainer.batch_size=16"), 120),
        ]
    return [
        TrainerCase("LRU, short steps", (*lru, "backbone.width=64"), 2000),
        TrainerCase("LRU, ListOps", ("task=listops", "model=lru", "task.sizes.train=2000"), 100),
        TrainerCase("STU, ListOps", ("task=listops", "model=stu", "task.sizes.train=2000"), 100),
    ]
