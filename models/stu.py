"""Spectral Transform Unit (STU), equations (4) and (5), and AR-STU, equation (6).

Paper: Agarwal, Suo, Chen, Hazan, "Spectral State Space Models" (arXiv 2312.06837). Reference code
read: google-deepmind/spectral_ssm, which is this class with a random initial M_u, without negative
filters and with k_y = 2 (`conf/model/stu_official.yaml`). The mathematics: `models.ops.stu`.

Additions to the paper: `bidirectional` and the recurrent form (`models.ops.filters`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Float

from models.checks import check_option, require_causal
from models.mixer import Mask, MixerModule, Sequences
from models.ops.filter_step import initial_features, next_features
from models.ops.filters import alternative_filters, spectral_filters
from models.ops.stu import HIGHEST, feature_moments, inverse_power, stu

FILTERS = {"hankel": spectral_filters, "alternative": alternative_filters}
INITS_M_U = ("zeros", "truncated_normal")
INITS_M_PHI = ("zeros", "xavier_normal")
# lag of each feedback, and whether its matrices are learned
FEEDBACKS = {
    "none": (1, False),
    "lag1": (1, False),
    "lag2": (2, False),
    "learned_lag2": (2, True),
    "learned": (1, True),
}

State = dict[str, Array]


class Filter(nnx.Variable):
    """A constant array that follows from the configuration: not trained and not saved."""


class STU(MixerModule):
    """Spectral filters over the input plus feedback from the output; causal unless bidirectional.

    Args:
        seq_len: the length of the filters and the longest input.
        num_filters: K, the number of leading eigenpairs of the matrix named by `filters`.
        filters: hankel | alternative, section 2 or appendix D of the paper.
        k_u: number of direct input taps M_u (3 in equation (4)).
        k_y: number of feedback matrices of `feedback=learned`; else None.
        negative_filters: adds the features U- with signs (-1)^i, as in the paper; hankel only.
        init_m_u: zeros (the paper) | truncated_normal (its code: scale D^(-1/2), cut at 2).
        init_m_phi: of M+ and M-: zeros (the paper) | xavier_normal (Flash STU). M_y starts at 0.
        feedback: none | lag1 | lag2 (alpha y_{t-1}, alpha y_{t-2}; equation (4) is lag2) |
            learned_lag2 (equation (5)) | learned (equation (6)); None is learned if there is a k_y,
            else lag2.
        feedback_scale: alpha of lag1 and lag2, 1 in equation (4).
        bidirectional: adds a unit with its own matrices over the reversed sequence.
        precondition: p, 0 to 0.5: the matrices of equation (4) are C^(-p) times the parameters,
            with C the second moments of the features (`models.ops.stu.feature_moments`). 0.5
            whitens the features; 0 is the paper. The function class is the same.
    Raises:
        ValueError: K, k_u or a lag exceeds L, a size is below 1, or an option is unknown or does
            not fit.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_filters: int,
        filters: str,
        k_u: int,
        k_y: int | None,
        negative_filters: bool,
        init_m_u: str,
        bidirectional: bool,
        feedback: str | None = None,
        feedback_scale: float | int = 1.0,
        init_m_phi: str = "zeros",
        precondition: float | int = 0.0,
        rngs: nnx.Rngs,
    ):
        if not 0 <= precondition <= 0.5:
            raise ValueError(f"model.precondition={precondition} must be in [0, 0.5]")
        for key, value in (("k_u", k_u), ("k_y", k_y)):
            if value is not None and value < 1:
                null = "; null is equation (4)" if key == "k_y" else ""
                raise ValueError(f"model.{key}={value} must be at least 1{null}")
        check_option("model.init_m_u", init_m_u, INITS_M_U)
        check_option("model.init_m_phi", init_m_phi, INITS_M_PHI)
        if k_u > seq_len or (k_y is not None and k_y >= seq_len):
            taps = f"model.k_u={k_u} and model.k_y={'null' if k_y is None else k_y}"
            raise ValueError(f"{taps} reach further back than task.seq_len={seq_len}; lower them")
        self.lag, self.alpha = feedback_form(feedback, feedback_scale, k_y)
        self.causal, self.bank = not bidirectional, (filters, seq_len, num_filters)
        self.sigma, self.phi = filter_variables(filters, seq_len, num_filters, negative_filters)

        def zeros(taps: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((taps, width, width)))

        def matrices_of_filters() -> nnx.Param:
            if init_m_phi == "zeros":
                return zeros(num_filters)
            # PyTorch takes axis 1 as inputs, axis 0 as outputs and axis 2 as taps
            xavier = variance_scaling(1.0, "fan_avg", "normal", in_axis=1, out_axis=0)
            return nnx.Param(xavier(rngs.params(), (num_filters, width, width)))

        self.m_u = zeros(k_u)
        if init_m_u == "truncated_normal":
            normal = jax.random.truncated_normal(rngs.params(), -2, 2, self.m_u.shape)
            self.m_u = nnx.Param(normal / width**0.5)
        self.m_plus = matrices_of_filters()
        self.m_minus = matrices_of_filters() if negative_filters else None
        self.m_y = zeros(k_y or 1) if self.alpha is None else None
        self.preconditioner = (
            Filter(self.inverse_moments(k_u, negative_filters, precondition))
            if precondition
            else None
        )
        self.anticausal = (
            STU(
                width,
                seq_len,
                num_filters=num_filters,
                filters=filters,
                k_u=k_u,
                k_y=k_y,
                negative_filters=negative_filters,
                init_m_u=init_m_u,
                bidirectional=False,
                feedback=feedback,
                feedback_scale=feedback_scale,
                init_m_phi=init_m_phi,
                precondition=precondition,
                rngs=rngs,
            )
            if bidirectional
            else None
        )

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        # rounding errors of the transforms are not causal: padding would change them
        x = jnp.where(mask[..., None], x, 0)
        m_minus = None if self.m_minus is None else self.m_minus[...]
        m_y = self.alpha if self.m_y is None else self.m_y[...]
        mix = None if self.preconditioner is None else self.preconditioner[...]
        matrices = self.m_u[...], self.m_plus[...], m_minus, m_y
        y = stu(x, self.phi[...], self.sigma[...], *matrices, lag=self.lag, mix=mix)
        return y if self.anticausal is None else y + apply_reversed(self.anticausal, x, mask)

    def inverse_moments(self, k_u: int, negative: bool, power: float) -> Float[Array, "J J"]:
        """C^(-power), with the second moments C of the features; learned feedback is left out."""
        filters, *sizes = self.bank
        sigma, phi = FILTERS[filters](*sizes)  # not the variables, which may be abstract
        moments = feature_moments(phi, sigma, k_u, negative, self.alpha or 0.0, self.lag)
        return jnp.asarray(inverse_power(moments, power))

    def init_state(self, batch_size: int) -> State:
        """Zeros, of a size that depends on K, k_u, the feedback and D, not on L."""
        require_causal(self.causal)
        k_u, width, _ = self.m_u.shape
        lags = self.lag * (1 if self.m_y is None else self.m_y.shape[0])
        features = initial_features(batch_size, width, *self.bank)
        state = {  # inputs and outputs: the latest first
            "inputs": jnp.zeros((batch_size, max(k_u - 1, 2), width)),
            "outputs": jnp.zeros((batch_size, lags, width)),
            "plus": features,
        }
        return state if self.m_minus is None else state | {"minus": features}

    def step(self, state: State, u_t: Float[Array, "B D"]) -> tuple[State, Float[Array, "B D"]]:
        """One position of `__call__` up to the error of `filter_recurrence`, for up to L steps.

        Beyond L, the filters of the recurrence continue, and those of `__call__` end.
        """
        dtype = state["plus"].dtype
        recent = jnp.concatenate([u_t.astype(dtype)[:, None], state["inputs"]], axis=1)
        new = {"inputs": recent[:, :-1]}
        m_u, sigma = self.m_u[...], self.sigma[...]
        # y_t reads U_{t-2}, so the features receive their input two steps late
        new["plus"] = next_features(state["plus"], recent[:, 2], *self.bank)
        features, matrices = [scaled(new["plus"], sigma)], [self.m_plus[...]]
        if self.m_minus is not None:
            new["minus"] = next_features(state["minus"], recent[:, 2], *self.bank, alternate=True)
            features.append(scaled(new["minus"], sigma))
            matrices.append(self.m_minus[...])
        f = jnp.concatenate([*features, recent[:, : len(m_u)]], axis=1)
        if self.preconditioner is not None:
            mix = self.preconditioner[...].astype(dtype)
            f = jnp.einsum("bid,ij->bjd", f, mix, precision=HIGHEST)
        m = jnp.concatenate([*matrices, m_u]).astype(dtype)
        y = jnp.einsum("bjd,jde->be", f, m, precision=HIGHEST)
        past = state["outputs"][:, self.lag - 1 :: self.lag]
        if self.m_y is not None:
            m_y = self.m_y[...].astype(dtype)
            y = y + jnp.einsum("bkd,kde->be", past, m_y, precision=HIGHEST)
        elif self.alpha is not None:
            y = y + self.alpha * past[:, 0]
        new["outputs"] = jnp.concatenate([y[:, None], state["outputs"][:, :-1]], axis=1)
        return new, y.astype(u_t.dtype)


def feedback_form(
    feedback: str | None, scale: float | int, k_y: int | None
) -> tuple[int, float | None]:
    """The lag of the feedback, and the factor of its identity or None if its matrices are learned.

    Raises:
        ValueError: an unknown feedback, or a scale or k_y that does not go with it.
    """
    name = feedback or ("lag2" if k_y is None else "learned")
    check_option("model.feedback", name, FEEDBACKS)
    if (name == "learned") != (k_y is not None):
        raise ValueError(
            f"model.feedback={name} does not go with model.k_y={'null' if k_y is None else k_y}: "
            "learned needs k_y, the number of its matrices; the others need k_y=null"
        )
    if abs(scale) > 1 or (scale != 1 and name not in ("lag1", "lag2")):
        raise ValueError(
            f"model.feedback_scale={scale} with model.feedback={name}: expected a number from -1 "
            "to 1 with lag1 or lag2, else 1"
        )
    lag, learned = FEEDBACKS[name]
    return lag, None if learned else 0.0 if name == "none" else float(scale)


def filter_variables(
    filters: str, seq_len: int, num_filters: int, negative_filters: bool
) -> tuple[Filter, Filter]:
    """sigma (K,) and phi (L, K) of the named matrix."""
    check_option("model.filters", filters, FILTERS)
    if filters == "alternative" and negative_filters:
        raise ValueError(
            "model.filters=alternative already include the signs (-1)^i; "
            "set model.negative_filters=false"
        )
    sigma, phi = FILTERS[filters](seq_len, num_filters)
    return Filter(jnp.asarray(sigma)), Filter(jnp.asarray(phi))


def scaled(h: Float[Array, "B N D"], sigma: Float[Array, " K"]) -> Float[Array, "B K D"]:
    """sigma_k^(1/4) h_k of the first K states; zeros for the last K - N, whose weight is nil."""
    num = min(h.shape[1], len(sigma))
    scale = sigma[:num].astype(h.dtype) ** 0.25
    return jnp.pad(h[:, :num] * scale[:, None], ((0, 0), (0, len(sigma) - num), (0, 0)))


def apply_reversed(mixer: Callable[..., Array], x: Sequences, mask: Mask) -> Sequences:
    """The outputs of a causal, linear mixer over the reversed sequences, in the original order.

    Padding comes first in the reversed sequence; zeros keep the state of a linear mixer at zero.
    """
    reversed_x = jnp.flip(jnp.where(mask[..., None], x, 0), 1)
    return jnp.flip(mixer(reversed_x, jnp.flip(mask, 1)), 1)
