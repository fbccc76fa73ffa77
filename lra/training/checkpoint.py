"""Saved states of a run, the last two, each complete or absent. Orbax does the writing.

<step>/             an Orbax checkpoint: the arrays of the state and, as JSON, what they mean (`progress`)
<step>/SHA256SUMS   of every file beside it, in the format of sha256sum: a damaged one is passed over
<step>.damaged/     one that was passed over; kept until the run has saved again
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lra.errors import LraError, RunFolderError
from lra.files import disk_errors, write_atomically
from lra.training.distributed import is_lost
from lra.training.memory import is_out_of_memory

log = logging.getLogger(__name__)

SPARE_BYTES = 2**20  # for metadata, the record and the metrics
SUMS = "SHA256SUMS"


class Restored(NamedTuple):
    """A state from the disk."""

    step: int
    state: Any
    progress: dict[str, Any]
    damaged: Sequence[int] = ()  # newer steps whose checkpoint could not be read


class Checkpoints:
    """Orbax checkpoints `folder/<step>`; `read_only` changes nothing on disk, also not what a live run is writing."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder, self.read_only = folder.absolute(), read_only

    @cached_property
    def manager(self) -> Any:
        """Made when first used, since orbax takes a second to import."""
        import orbax.checkpoint as ocp

        silence_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self.read_only else 2,
            # a state of some MB takes milliseconds, and what save() returned from is on disk
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not self.read_only,  # what a killed save left behind
            create=not self.read_only,
            read_only=self.read_only,
        )
        with disk_errors(self.folder):
            return ocp.CheckpointManager(self.folder, options=options)

    def close(self) -> None:
        """End the manager's threads; may be called again."""
        if manager := vars(self).pop("manager", None):
            manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save a state (a tree of arrays) and `progress` (JSON values) in one piece; drops the oldest of three.

        Raises:
            LraError: the disk is full or refuses; the checkpoints before this one are whole.
        """
        import orbax.checkpoint as ocp

        manager, leaves = self.manager, jax.tree.leaves(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            progress=ocp.args.JsonSave(json.loads(json.dumps(progress))),
        )
        # asked first, since a disk that fills up while orbax writes leaves traces of its threads on the terminal
        if shutil.disk_usage(self.folder).free < sum(leaf.nbytes for leaf in leaves) + SPARE_BYTES:
            raise self._refused(step, "the disk is full")
        try:
            manager.save(step, args=args, force=True)
        except (OSError, ValueError) as error:  # orbax wraps a full disk in ValueError
            for half_written in self.folder.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
            raise self._refused(step, reason_of(error)) from error
        if jax.process_index() == 0:
            write_atomically(self.folder / str(step) / SUMS, checksums(self.folder / str(step)))
            for surpassed in self.folder.glob("*.damaged"):
                shutil.rmtree(surpassed, ignore_errors=True)

    def _refused(self, step: int, reason: str) -> LraError:
        free = shutil.disk_usage(self.folder).free // 2**20
        return LraError(
            f"cannot write the checkpoint of step {step} in {self.folder} ({free} MiB free): {reason}; "
            f"those before it are whole: make room and run the same command with resume=auto"
        )

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be read, None where there is none; `like` gives the tree, shapes and dtypes.

        One that is damaged costs a line on stderr, and the one before it is taken.

        Raises:
            RunFolderError: there are checkpoints, and none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            # before orbax reads it: that notices no flipped bit, and of a file cut short it logs the trace of every thread
            problem = find_corruption(self.folder / str(step))
            if problem is None:
                try:
                    state, progress = self._read(step, like)
                except Exception as error:  # tensorstore raises whatever its drivers do
                    if is_out_of_memory(error) or is_lost(
                        error
                    ):  # the device's memory or another process, not the file
                        raise
                    problem = " ".join(str(error).split())[:200] or type(error).__name__
                else:
                    self._set_aside(damaged, step)
                    return Restored(step, state, progress, tuple(damaged))
            damaged[step] = problem
        if not damaged:
            return None
        found = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        raise RunFolderError(
            f"no checkpoint in {self.folder} can be read ({found}); remove that folder to start anew"
        )

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree.flatten(like)
        target = [
            jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=leaf.sharding)
            for leaf in leaves
        ]
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
        )
        restored = self.manager.restore(step, args=args)
        return jax.tree.unflatten(treedef, restored["state"]), restored["progress"]

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Say which checkpoints were passed over for that of `step`, and make their names free to be saved again."""
        for bad, problem in damaged.items():
            log.warning(
                f"the checkpoint of step {bad} in {self.folder} is damaged ({problem}); step {step} is taken instead"
            )
        if not damaged or self.read_only:
            return
        if jax.process_count() > 1:  # each host has looked at all of them before one moves them
            multihost_utils.sync_global_devices("checkpoints looked at")
        if jax.process_index() == 0:
            for bad in damaged:
                aside = self.folder / f"{bad}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.folder / str(bad), aside)
        self.manager.reload()


@cache
def silence_orbax() -> None:
    """Of a failed save or read, orbax and tensorstore print the trace of every thread beside the error that they raise."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    warnings.filterwarnings(
        "ignore", message="coroutine 'async_(de)?serialize", category=RuntimeWarning
    )
    shown = sys.unraisablehook

    def hook(
        unraisable: Any,
    ) -> None:  # of threads that report to a loop which the first error has ended
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


def reason_of(error: Exception) -> str:
    """Why tensorstore could not write, in some words of the hundreds that it says."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or os.strerror(errno.ENOSPC) in text:
        return "the disk is full"
    known = (
        os.strerror(code)
        for code in (errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    )
    return next((reason for reason in known if reason in text), text[:200])


def checkpoint_metadata(config: Mapping[str, Any], vocab: Sequence[str] | None) -> dict[str, Any]:
    """What the arrays of a checkpoint mean, kept in its `progress`.

    Every random number of a run is a function of (seed, step) and of JAX's generator: there is no state of it to save.
    """
    return {
        "vocab": vocab,
        "protocol": config["protocol"],
        "config": config,
        "random": generator(config["seed"]),
    }


def generator(seed: int) -> dict[str, Any]:
    """What random numbers are made from, besides the step."""
    kind, partitionable = jax.config.jax_default_prng_impl, jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    return {"seed": seed, "kind": kind, "partitionable": partitionable}


def check_metadata(folder: Path, progress: Mapping[str, Any], vocab: Sequence[str] | None) -> None:
    """Raises: RunFolderError, where the weights in `folder` have other token ids or the run had other random numbers."""
    if tuple(progress["vocab"] or ()) != tuple(vocab or ()):
        raise RunFolderError(
            f"{folder} was trained with another vocabulary; choose another output.root"
        )
    saved = progress.get("random")  # none in what older versions wrote
    if saved and saved != generator(saved["seed"]):
        raise RunFolderError(
            f"{folder} was trained with JAX's generator {saved['kind']}, partitionable {saved['partitionable']}; set "
            f"JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE to these, or choose another output.root"
        )


def checksums(folder: Path) -> bytes:
    """SHA-256 of every file below `folder`, as `sha256sum` prints them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(
        f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files
    ).encode()


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where nothing is or where it was written without sums."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        for line in lines:
            expected, _, name = line.partition("  ")
            if not name:
                return f"{SUMS} is not what was written"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != expected:
                return f"{name} is not what was written"
    except (
        FileNotFoundError
    ):  # killed between the checkpoint and its sums; what orbax has named is complete
        return None
    except (OSError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return None if lines else f"{SUMS} is empty"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint, without the second that orbax takes to import."""
    return any(path.name.isdigit() for path in folder.glob("*"))
