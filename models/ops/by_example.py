"""How does each device work on its own examples alone, where the compiler would collect those of all?

It cannot split a Fourier transform, nor a reshape that puts another axis in front of the examples: of a batch that lies over
several devices it would first collect all of it on each.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def by_example(function: Callable[..., Array], x: Array, *shared: Array) -> Array:
    """`function(x, *shared)`, on each device of the mesh in context for its own part of the batch.

    The mesh is what `jax.sharding.use_abstract_mesh` set, as the harness does for several devices; without one, this is the
    call itself.

    Args:
        function: of a batch and of arrays that do not depend on it; its result has the examples on axis 0 too.
        x: a batch, examples on axis 0.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % mesh.size:
        return function(x, *shared)
    examples = PartitionSpec(mesh.axis_names)
    specs = (examples, *(PartitionSpec() for _ in shared))
    # the check wants the starting values of every inner loop marked by hand as differing between devices
    return jax.shard_map(function, in_specs=specs, out_specs=examples, check_vma=False)(x, *shared)


def own_examples(count: int) -> int:
    """How many of the `count` examples of a batch each device of the mesh in context has."""
    mesh = jax.sharding.get_abstract_mesh()
    return count if mesh.empty else -(-count // mesh.size)
