"""Matrix products of recurrent states, in full precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def matmul_highest(x: Float[Array, "*B N"], matrix: Float[Array, "N M"]) -> Float[Array, "*B M"]:
    """x @ matrix with `Precision.HIGHEST`.

    A GPU may round float32 factors to the 10 bits of TF32; in a recurrence this error compounds
    over L steps.
    """
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


@jax.checkpoint
def real_product(
    x: Complex[Array, "*B N"], re: Float[Array, "N M"], im: Float[Array, "N M"]
) -> Float[Array, "*B M"]:
    """Re(x (re + i im)).

    The backward pass recomputes the real and imaginary parts of x, which the recurrence saves
    anyway.
    """
    return matmul_highest(x.real, re) - matmul_highest(x.imag, im)
