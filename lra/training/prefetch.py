"""Training data on the device, or on the host with prefetch. Both give the same batches."""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lra.data.store import Store
from lra.errors import LraError
from lra.training import distributed
from lra.training.data_parallel import DataParallel
from lra.training.memory import device_bytes, is_out_of_memory
from lra.training.state import BatchWindow, Examples, State
from lra.training.step import StepFunctions, epoch_order

WINDOW_BYTES = 2**26  # size of a window of batches
PREFETCHED_WINDOWS = 2  # windows on the device besides the current one
DATA_SHARE = 0.5  # largest share of a device's memory for the data


def place_data(store: Store, devices: DataParallel, placement: str) -> dict[str, Examples]:
    """All splits on the devices or on the host, each distinct split once.

    Args:
        placement: device, host, or auto, which takes the devices if the data fit there.
    Raises:
        LraError: the data do not fit on the devices.
    """
    unique = {id(split): split for split in store.splits.values()}
    size = sum(split.inputs.nbytes for split in unique.values())
    on_hosts = placement == "host" or (
        placement == "auto" and not all(distributed.all_gather(fits_on_device(size, devices)))
    )
    put = on_host if on_hosts or devices.mesh else on_device
    try:
        placed = {key: put(split) for key, split in unique.items()}
        if not on_hosts:
            placed = devices.replicate(placed)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        kind = jax.devices()[0].device_kind
        raise LraError(
            f"the data, {size / 1e9:.1f} GB, do not fit on {kind}; set data.placement=host"
        ) from error
    return {name: placed[id(split)] for name, split in store.splits.items()}


class TrainingBatches(ABC):
    """The batches of a run: training data on the device or on the host."""

    def start(self, step: int) -> None:
        """Prepares for training from `step` on."""

    @abstractmethod
    def available_until(self, step: int) -> int:
        """Returns the last step to which one call from `step` on has data; waits for the data."""

    @abstractmethod
    def jitted_call(
        self, step_fns: StepFunctions, state: State, constants: Any, until: int
    ) -> tuple[Callable[..., State], tuple]:
        """Returns the jitted function and the arguments that train from `state.step` to `until`."""

    def call(self, step_fns: StepFunctions, state: State, constants: Any, until: int) -> State:
        """Trains from `state.step` to `until`; donates `state`."""
        function, args = self.jitted_call(step_fns, state, constants, until)
        return function(*args)

    def close(self) -> None:
        """Stops all prefetching and frees what was prefetched."""


class DeviceData(TrainingBatches):
    """Training data on the device; the jitted function draws its batches by index."""

    def __init__(self, split: Examples):
        self.split = split

    def available_until(self, step: int) -> int:
        return sys.maxsize

    def jitted_call(
        self, step_fns: StepFunctions, state: State, constants: Any, until: int
    ) -> tuple[Callable[..., State], tuple]:
        return step_fns.train_steps, (state, constants, self.split, np.int32(until))


class HostPrefetch(TrainingBatches):
    """Training data on the host; a thread sends windows of batches to the device ahead of time.

    Args:
        split: NumPy arrays with the dtypes that they have on the device.
        order_key: key for `epoch_order`.
        batch_size, micro_batch: number of examples over all devices.
        devices: devices that share the batch.
        steps: number of steps of the run.
    """

    def __init__(
        self,
        split: Examples,
        order_key: jax.Array,
        batch_size: int,
        micro_batch: int,
        devices: DataParallel,
        steps: int,
    ):
        self.split, self.batch_size, self.devices, self.steps = split, batch_size, devices, steps
        # Shuffle on the CPU; on the accelerator the shuffle would queue behind the running steps.
        self.cpu = cpu_device()
        self.order_key = order_key if self.cpu is None else jax.device_put(order_key, self.cpu)
        self.batch_shape = (batch_size // micro_batch, micro_batch)
        step_bytes = batch_size * sum(x[:1].nbytes for x in split)
        self.window_steps = max(1, min(WINDOW_BYTES // step_bytes, steps))
        self.steps_per_epoch = len(split.labels) // batch_size
        self.epoch: tuple[int, np.ndarray] | None = None  # the latest epoch and its order
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.pending: deque[Future[BatchWindow]] = deque()
        self.current: BatchWindow | None = None
        self.first = self.next_first = 0  # first step of the current and of the next new window

    def start(self, step: int) -> None:
        self.next_first = step
        for _ in range(PREFETCHED_WINDOWS):
            self._prefetch()

    def available_until(self, step: int) -> int:
        while self.current is None or step >= self.first + self.window_steps:
            self.current = None  # free its memory before the wait
            self.current = self.pending.popleft().result()
            self.first = int(self.current.first)
            self._prefetch()
        return self.first + self.window_steps

    def jitted_call(
        self, step_fns: StepFunctions, state: State, constants: Any, until: int
    ) -> tuple[Callable[..., State], tuple]:
        window = self.window(0) if self.current is None else self.current
        return step_fns.train_window, (state, constants, window, np.int32(until))

    def call(self, step_fns: StepFunctions, state: State, constants: Any, until: int) -> State:
        assert self.current is not None, "available_until selects the window"
        return super().call(step_fns, state, constants, until)

    def close(self) -> None:
        self.executor.shutdown(cancel_futures=True)
        self.pending.clear()
        self.current = None

    def window(self, first: int) -> BatchWindow:
        """Returns the batches of `window_steps` steps from `first` on, on the devices."""
        rows = np.stack([self.rows(first + i) for i in range(self.window_steps)])
        rows = rows.reshape(self.window_steps, *self.batch_shape)
        return BatchWindow(
            self.devices.replicate(np.int32(first)),
            Examples(*(self._put(x, rows) for x in self.split)),
        )

    def rows(self, step: int) -> np.ndarray:
        """Returns the row numbers (B,) of a step's examples, the same as on the device."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.epoch is None or self.epoch[0] != epoch:
            with jax.default_device(self.cpu):
                order = epoch_order(self.order_key, epoch, len(self.split.labels))
                self.epoch = (epoch, np.asarray(order))
        return self.epoch[1][position * self.batch_size :][: self.batch_size]

    def _prefetch(self) -> None:
        if self.next_first < self.steps:
            self.pending.append(self.executor.submit(self.window, self.next_first))
            self.next_first += self.window_steps

    def _put(self, x: Any, rows: np.ndarray) -> jax.Array:
        if self.devices.mesh is None:
            return jnp.asarray(x[rows])
        # each process reads only the rows of its own devices
        shape = (*rows.shape, *x.shape[1:])
        sharding = self.devices.sharding(None, None, "data")
        return jax.make_array_from_callback(
            shape, sharding, lambda index: x[rows[(index or ())[:3]]]
        )


def cpu_device() -> jax.Device | None:
    """Returns this process's CPU device, None if JAX was started without one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def on_device(split) -> Examples:
    """Returns a packed split on the device; a CPU uses the memory-mapped file without a copy."""
    inputs = jax.device_put(split.inputs.view(np.ndarray), may_alias=True)
    return Examples(inputs, jnp.asarray(split.lengths), jnp.asarray(split.labels.astype(np.int32)))


def on_host(split) -> Examples:
    """Returns a packed split as memory-mapped, with the dtypes that it has on a device."""
    return Examples(
        split.inputs.view(np.ndarray),
        np.asarray(split.lengths, jax.dtypes.canonicalize_dtype(split.lengths.dtype)),
        np.asarray(split.labels, np.int32),
    )


def fits_on_device(nbytes: int, devices: DataParallel) -> bool:
    """Returns whether `nbytes` of data on each device leave enough memory for training."""
    device = jax.local_devices()[0]
    available = device_bytes(device)
    if device.platform == "cpu":
        # CPU devices share one memory; a single one uses the memory-mapped file
        nbytes = 0 if devices.mesh is None else nbytes * devices.num_local_devices
    return available is None or nbytes <= DATA_SHARE * available
