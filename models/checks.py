"""Checks of options and the accumulation dtype that several mixers share."""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array


def check_option(key: str, found: str, allowed: Collection[str]) -> None:
    """Check that `found` is one of `allowed`.

    Raises:
        ValueError: it is not; the message names the config key.
    """
    if found not in allowed:
        raise ValueError(f"{key}={found} is unknown; choose one of {', '.join(allowed)}")


def require_causal(
    causal: bool,
    found: str = "model.bidirectional=true",
    instead: str = "model.bidirectional=false",
) -> None:
    """Check that a mixer is causal; only then it has a recurrent form.

    Args:
        found: the option that makes the mixer non-causal.
        instead: the option to set.
    Raises:
        ValueError: the mixer is not causal.
    """
    if not causal:
        raise ValueError(f"{found} reads the future and has no recurrent form; set {instead}")


def at_least_float32(x: Array) -> Array:
    """`x` in float64 if it is float64, else in float32.

    States in 16 bits stop decaying after a few hundred steps, and sums and transforms over L lose
    their digits.
    """
    # explicit, because strict promotion refuses even `promote_types`
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
