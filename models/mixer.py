"""The interface between a mixer and the backbone.

A mixer maps a sequence (B, L, D) to a sequence of the same shape and is the only part of the
network that moves information between positions.
"""

from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Bool, Float

Sequences = Float[Array, "B L D"]  # inputs and outputs of a mixer
Mask = Bool[Array, "B L"]  # True at real positions, which come first


@runtime_checkable
class Mixer(Protocol):
    """Attributes and methods of a mixer that the backbone uses.

    Attributes:
        causal: position t reads no position after t.
        rotary: rotates its queries and keys by position; needs `backbone.positions=rotary`.
        gates_residual: takes the residual stream as a further argument `residual` (of `step` too)
            and applies its own gates and dropout.
        grows_with_length: the number of its parameters depends on `seq_len`.
    """

    causal: bool
    rotary: bool
    gates_residual: bool
    grows_with_length: bool

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        """Outputs in the dtype of `x`.

        Args:
            x: inputs, float32 or bfloat16.
            mask: False at padding.
            train: enables dropout.
            rngs: a stream named `dropout`, required in training by mixers with dropout.
        """


@runtime_checkable
class StreamingMixer(Mixer, Protocol):
    """A mixer with a recurrent form, whose state does not grow with the number of steps."""

    def init_state(self, batch_size: int) -> Any:
        """The state before the first input.

        Raises:
            ValueError: the options of this mixer exclude a recurrent form.
        """

    def step(self, state: Any, u_t: Float[Array, "B D"]) -> tuple[Any, Float[Array, "B D"]]:
        """The next state and the output: one position of `__call__`."""


@runtime_checkable
class MixerFactory(Protocol):
    """What the backbone passes to the constructor of a mixer; all other arguments are options."""

    def __call__(self, *, width: int, seq_len: int, rngs: nnx.Rngs) -> Mixer:
        """The mixer of one layer for inputs (B, L, D) with D = `width` and L <= `seq_len`."""


class MixerModule(nnx.Module):
    """Base class of mixers; a subclass sets `causal`, on the class or in its constructor."""

    causal: bool
    rotary: bool = False
    gates_residual: bool = False
    grows_with_length: bool = False
