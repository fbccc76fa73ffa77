"""Checks of options and the accumulation dtype that several mixers share."""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array


def check_option(key: str, found: str, allowed: Collection[str]) -> None:
    """Raises a ValueError that names `key` unless `found` is one of `allowed`."""
    if found not in allowed:
        raise ValueError(f"{key}={found} is unknown; choose one of {', '.join(allowed)}")


def check_positive(**sizes: int | None) -> None:
    """Raises a ValueError unless each option of the model is at least 1 or None."""
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"model.{key}={value} must be at least 1")


def expanded_width(expand: float | int, width: int) -> int:
    """`expand` times `width`; a ValueError unless this is a whole number above 0."""
    inner = round(expand * width)
    if inner < 1 or inner != expand * width:
        raise ValueError(
            f"model.expand={expand} times backbone.width={width} must be a whole number above 0"
        )
    return inner


def require_causal(
    causal: bool,
    found: str = "model.bidirectional=true",
    instead: str = "model.bidirectional=false",
) -> None:
    """Raises a ValueError unless a mixer is causal; only then it has a recurrent form.

    Args:
        found: the option that makes the mixer non-causal.
        instead: the option to set.
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
