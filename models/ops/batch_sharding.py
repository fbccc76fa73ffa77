"""Runs an operation on each device's shard of the batch.

XLA's partitioner cannot split a Fourier transform, nor a reshape that moves another axis in front
of the batch: it would all-gather the batch onto every device.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def shard_over_batch(function: Callable[..., Array], x: Array, *shared: Array) -> Array:
    """`function(x, *shared)` on each device's shard of `x`; examples are on axis 0 of all batches.

    The mesh is the one that `jax.sharding.use_abstract_mesh` sets. Without a mesh, or if the batch
    does not divide among its devices, this is the plain call. Every device holds `shared` whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % mesh.size:
        return function(x, *shared)
    batch_spec = PartitionSpec(mesh.axis_names)
    specs = (batch_spec, *(PartitionSpec() for _ in shared))
    # check_vma requires every inner loop's initial values to be marked as device-varying
    return jax.shard_map(function, in_specs=specs, out_specs=batch_spec, check_vma=False)(
        x, *shared
    )


def local_batch_size(batch_size: int) -> int:
    """Examples of a batch on each device of the mesh in context, rounded up."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch_size if mesh.empty else -(-batch_size // mesh.size)
