"""What do several mixers refuse alike, and in what precision do they all count?"""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array


def check_option(key: str, found: str, allowed: Collection[str]) -> None:
    """A ValueError that names the config key unless `found` is one of `allowed`."""
    if found not in allowed:
        raise ValueError(f"{key}={found} is unknown; choose one of {', '.join(allowed)}")


def refuse_to_stream(
    causal: bool,
    found: str = "model.bidirectional=true",
    instead: str = "model.bidirectional=false",
) -> None:
    """A ValueError unless `causal`; `found` is the option that makes the model look ahead."""
    if not causal:
        raise ValueError(f"{found} reads the future and has no recurrent form; set {instead}")


def at_least_float32(x: Array) -> Array:
    """16-bit states would stop decaying after a few hundred steps; sums and transforms over L want their digits too."""
    # by hand, since under strict promotion even `promote_types` refuses
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
