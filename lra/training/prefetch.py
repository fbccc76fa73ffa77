"""Where does a step get its batch? From data that lie on the device, or from the host, read ahead; the batches are the same."""

import queue
import sys
import threading
from collections.abc import Callable
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
from lra.training.step import Program, epoch_order


def on_device(split) -> Examples:
    """A packed split on the device; a CPU reads the mapped file itself, without a copy."""
    inputs = jax.device_put(split.inputs.view(np.ndarray), may_alias=True)
    return Examples(inputs, jnp.asarray(split.lengths), jnp.asarray(split.labels.astype(np.int32)))


WINDOW_BYTES = 2**26  # of batches that go to the device at once
AHEAD = 2  # windows that wait there
SHARE = 0.5  # of a device's memory that data may take: the rest is for training


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


class DeviceData:
    """Data on the device: `run` draws from them by index."""

    def __init__(self, split: Examples):
        self.split = split

    def start(self, step: int) -> None: ...

    def end(self, step: int) -> int:
        return sys.maxsize

    def run(self, program: Program, state: State, fixed: Any, until: int) -> State:
        return program.run(state, fixed, self.split, np.int32(until))

    def trial(
        self, program: Program, state: State, fixed: Any, until: int
    ) -> tuple[Callable, tuple]:
        """The jitted function and the arguments of a call from the first step until `until`."""
        return program.run, (state, fixed, self.split, np.int32(until))

    def close(self) -> None: ...


class HostPrefetch:
    """Data on the host: a thread draws the rows of the steps to come and sends them, a window of steps at a time.

    Args:
        split: NumPy arrays, as `Examples` on the device would hold them.
        order_key: of `epoch_order`.
        batch_size, micro_batch: examples, over all devices.
        steps: of the whole run.
    """

    def __init__(
        self,
        split: Examples,
        order_key: jax.Array,
        batch_size: int,
        micro_batch: int,
        layout: DataParallel,
        steps: int,
    ):
        self.split, self.batch_size, self.layout = split, batch_size, layout
        # orders are drawn beside the steps: an accelerator would come to them after the call under way
        self.cpu = cpu_device()
        self.order_key = order_key if self.cpu is None else jax.device_put(order_key, self.cpu)
        self.parts = (batch_size // micro_batch, micro_batch)
        step_bytes = batch_size * sum(x[:1].nbytes for x in split)
        self.steps, self.window_steps = steps, max(1, min(WINDOW_BYTES // step_bytes, steps))
        self.steps_per_epoch = len(split.labels) // batch_size
        self.epoch: tuple[int, np.ndarray] | None = None
        self.ready: queue.SimpleQueue[BatchWindow | Exception] = queue.SimpleQueue()
        self.room = threading.Semaphore(
            AHEAD
        )  # taken before a window is made, so that no more ever exist
        self.current: BatchWindow | None = None
        self.first = 0  # of the current window
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """Begin to read ahead, from `step` to the end of the run."""
        self.thread = threading.Thread(
            target=self._read_ahead, args=(step,), name="lra-feed", daemon=True
        )
        self.thread.start()

    def end(self, step: int) -> int:
        """The first step that the window of `step` does not hold."""
        self._advance(step)
        return self.first + self.window_steps

    def run(self, program: Program, state: State, fixed: Any, until: int) -> State:
        assert self.current is not None
        return program.run_window(state, fixed, self.current, np.int32(until))

    def trial(
        self, program: Program, state: State, fixed: Any, until: int
    ) -> tuple[Callable, tuple]:
        return program.run_window, (state, fixed, self.window(0), np.int32(until))

    def close(self) -> None:
        """Stop the thread and let go of what it read."""
        self.stopped.set()
        self.room.release()  # the thread may be waiting for it
        if self.thread is not None:
            self.thread.join()
        self.current, self.ready = None, queue.SimpleQueue()

    def window(self, first: int) -> BatchWindow:
        """The batches of `window_steps` steps from `first` on, on the devices."""
        rows = np.stack([self.rows(first + i) for i in range(self.window_steps)])
        rows = rows.reshape(self.window_steps, *self.parts)
        return BatchWindow(
            self.layout.replicate(np.int32(first)),
            Examples(*(self._send(x, rows) for x in self.split)),
        )

    def rows(self, step: int) -> np.ndarray:
        """The examples (B,) of a step, as `run` draws them."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.epoch is None or self.epoch[0] != epoch:
            with jax.default_device(self.cpu):
                self.epoch = (
                    epoch,
                    np.asarray(epoch_order(self.order_key, epoch, len(self.split.labels))),
                )
        return self.epoch[1][position * self.batch_size :][: self.batch_size]

    def _send(self, x: Any, rows: np.ndarray) -> jax.Array:
        if self.layout.mesh is None:
            return jnp.asarray(x[rows])
        # each process reads the rows of its own devices alone
        shape, sharding = (*rows.shape, *x.shape[1:]), self.layout.sharding(None, None, "data")
        return jax.make_array_from_callback(
            shape, sharding, lambda index: x[rows[(index or ())[:3]]]
        )

    def _advance(self, step: int) -> None:
        while self.current is None or step >= self.first + self.window_steps:
            self.current = None  # its memory is free before the next one is waited for
            found = self.ready.get()
            self.room.release()
            if isinstance(found, Exception):
                raise found
            self.current, self.first = found, int(found.first)

    def _read_ahead(self, step: int) -> None:
        try:
            for first in range(step, self.steps, self.window_steps):
                self.room.acquire()
                if self.stopped.is_set():
                    return
                self.ready.put(self.window(first))
        except Exception as error:  # raised where the window is waited for
            self.ready.put(error)


def cpu_device() -> jax.Device | None:
    """This process's CPU as a device; None where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def on_host(split) -> Examples:
    """A packed split as it is mapped, with the dtypes it would have on a device."""
    return Examples(
        split.inputs.view(np.ndarray),
        np.asarray(split.lengths, jax.dtypes.canonicalize_dtype(split.lengths.dtype)),
        np.asarray(split.labels, np.int32),
    )


def fits_on_device(nbytes: int, layout: DataParallel) -> bool:
    """Whether so many bytes of data leave room for training on each device of the layout."""
    device = jax.local_devices()[0]
    available = device_bytes(device)
    if (
        device.platform == "cpu"
    ):  # devices that share one memory; a single one reads the mapped file itself
        nbytes = 0 if layout.mesh is None else nbytes * len(layout.mesh.local_devices)
    return available is None or nbytes <= SHARE * available
