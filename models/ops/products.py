"""How are states multiplied by matrices, with all their digits and without a second copy of them?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def exactly(x: Float[Array, "*B N"], matrix: Float[Array, "N M"]) -> Float[Array, "*B M"]:
    """x @ matrix with all digits of its dtype, for what goes from step to step and what reads it.

    A GPU would round float32 factors to the 10 bits of TF32, and in a recurrence that error compounds over L steps.
    """
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


@jax.checkpoint
def real_product(
    x: Complex[Array, "*B N"], re: Float[Array, "N M"], im: Float[Array, "N M"]
) -> Float[Array, "*B M"]:
    """Re(x (re + i im)); the backward pass takes the parts of x from x, which a recurrence keeps anyway."""
    return exactly(x.real, re) - exactly(x.imag, im)
