"""Data parallelism: the devices of a run, and where arrays live on them.

The batch is sharded over all devices; everything else is replicated. One mesh with the automatic
axis `data` is used, so the compiler partitions a step and sums its gradients. With one device there
is no mesh.
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
    """The devices of a run in all processes.

    Args:
        devices: devices that share a batch; empty for JAX's default device.
    """

    def __init__(self, devices: Sequence[jax.Device] = ()):
        self.num_devices = max(len(devices), 1)
        self.mesh = None
        if self.num_devices > 1:
            self.mesh = jax.make_mesh(
                (self.num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
            )

    @property
    def num_local_devices(self) -> int:
        """Number of devices of this process."""
        return 1 if self.mesh is None else len(self.mesh.local_devices)

    def round_up(self, batch_size: int) -> int:
        """Rounds a batch size up to a multiple of the number of devices."""
        return -(-batch_size // self.num_devices) * self.num_devices

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding that splits an array along the named axes."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def put(self, x: Any, *axes: str | None) -> jax.Array:
        """Places an array (the same on every process), split along the named axes."""
        sharding = self.sharding(*axes)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                self.put(jax.random.key_data(x), *axes), impl=jax.random.key_impl(x)
            )
        x = np.asarray(x)  # jax.device_put would first compare the arrays of all processes
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def replicate(self, tree: Any) -> Any:
        """Places a tree (the same on every process) on each device."""
        return tree if self.mesh is None else jax.tree.map(self.put, tree)

    def shard_batch(self, tree: Any) -> Any:
        """Under jit: shards axis 0 of all arrays over the devices."""
        return self._constrain(tree, "data")

    def replicate_under_jit(self, tree: Any) -> Any:
        """Under jit: replicates all arrays, so that each process can read them."""
        return self._constrain(tree)

    def _constrain(self, tree: Any, *axes: str) -> Any:
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.sharding(*axes))

    @contextmanager
    def mesh_context(self) -> Iterator[None]:
        """Sets the mesh for operations that read it while they are traced (`models.ops`)."""
        if self.mesh is None:
            yield
            return
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield


def choose_devices(cfg: DictConfig) -> DataParallel:
    """Returns the devices of a config: `trainer.devices` of each process, all of them if null.

    Raises:
        ConfigError: a process has fewer devices, or they do not divide the batch.
    """
    wanted, local = cfg.trainer.devices, jax.local_devices()
    if wanted is not None and wanted > len(local):
        raise ConfigError(
            f"trainer.devices={wanted}: this process has {len(local)} ({local[0].device_kind}); "
            f"take at most {len(local)}, or null for all"
        )
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    devices = [device for own in by_process.values() for device in own[:wanted]]
    if cfg.trainer.batch_size % len(devices):
        processes = f" of {len(by_process)} processes" if len(by_process) > 1 else ""
        raise ConfigError(
            f"trainer.batch_size={cfg.trainer.batch_size} (the global batch) must be a multiple of "
            f"the {len(devices)} devices{processes} that share it; change it, or set "
            f"trainer.devices"
        )
    return DataParallel(devices)
