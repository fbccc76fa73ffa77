"""Which devices does a run use, and what lies where? The batch is split over all of them, everything else is on each.

JAX's own data parallelism: one mesh with the axis `data`, of automatic kind, over which the compiler splits a step and sums
its gradients. On one device there is no mesh, and nothing changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omegaconf import DictConfig

from lra.errors import ConfigError


class DataParallel:
    """The devices of a run, those of all processes.

    Args:
        devices: all that share a batch; none for JAX's default device.
    """

    def __init__(self, devices: Sequence[jax.Device] = ()):
        self.count = max(len(devices), 1)
        self.mesh = None
        if self.count > 1:
            self.mesh = jax.make_mesh(
                (self.count,), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
            )

    @property
    def local_count(self) -> int:
        """Those of this process."""
        return 1 if self.mesh is None else len(self.mesh.local_devices)

    def sharding(self, *axes: str | None) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def replicate(self, tree: Any) -> Any:
        """`tree`, the same on every process, on each device."""
        return tree if self.mesh is None else jax.tree.map(lambda x: self.put(x), tree)

    def put(self, x: Any, *axes: str | None) -> jax.Array:
        """An array on the devices, split along the axes that are named; each process reads its own part of `x`."""
        sharding = self.sharding(*axes)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                self.put(jax.random.key_data(x), *axes), impl=jax.random.key_impl(x)
            )
        x = np.asarray(x)  # not device_put, which compares the arrays of all processes first
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def split(self, tree: Any) -> Any:
        """While tracing: the examples of `tree`, axis 0, over the devices."""
        return (
            tree
            if self.mesh is None
            else jax.lax.with_sharding_constraint(tree, self.sharding("data"))
        )

    def gather(self, tree: Any) -> Any:
        """While tracing: all of `tree` on each device, so that each process can read it."""
        return (
            tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self.sharding())
        )

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Sets the mesh that operations read while they are traced (`models.ops.batch_sharding`)."""
        if self.mesh is None:
            yield
            return
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield

    def whole(self, count: int) -> int:
        """`count` rounded up to what the devices can share."""
        return -(-count // self.count) * self.count


def choose_devices(cfg: DictConfig) -> DataParallel:
    """The layout of a config: `trainer.devices` of each process, all of them where it is null.

    Raises:
        ConfigError: there are fewer, or they cannot share the batch evenly.
    """
    wanted, local = cfg.trainer.devices, jax.local_devices()
    if wanted is not None and wanted > len(local):
        raise ConfigError(
            f"trainer.devices={wanted}: this process has {len(local)} ({local[0].device_kind}); take at most "
            f"{len(local)}, or null for all"
        )
    per_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        per_process.setdefault(device.process_index, []).append(device)
    layout = DataParallel([device for own in per_process.values() for device in own[:wanted]])
    if cfg.trainer.batch_size % layout.count:
        hosts = f" of {len(per_process)} processes" if len(per_process) > 1 else ""
        raise ConfigError(
            f"trainer.batch_size={cfg.trainer.batch_size} (the global batch) must be a multiple of the {layout.count} "
            f"devices{hosts} that share it; change it, or set trainer.devices"
        )
    return layout
