"""Layers whose computation follows the dtype of their inputs; their parameters stay float32."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Linear):
    """`nnx.Linear` that multiplies in the dtype of its inputs and returns it.

    The bias is added in float32, because its gradient is a sum over B L terms; NNX would promote
    bfloat16 inputs to float32 or, with `dtype=bfloat16`, round the bias too.
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs
    ):
        super().__init__(
            in_features, out_features, use_bias=use_bias, promote_dtype=_cast_kernel, rngs=rngs
        )

    def __call__(
        self, inputs: Float[Array, "*B D_in"], *args: Any, **kwargs: Any
    ) -> Float[Array, "*B D_out"]:
        return super().__call__(inputs, *args, **kwargs).astype(inputs.dtype)


def _cast_kernel(arrays: Any, /, **_: Any) -> Any:
    inputs, kernel, bias = arrays
    return inputs, kernel.astype(inputs.dtype), bias
