"""Saved states of a run, the last two, each complete or absent. Orbax does the writing."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lra.errors import LraError

SPARE_BYTES = 2**20  # for metadata, the record and the metrics


class Checkpoints:
    """Orbax checkpoints `folder/<step>`."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.ocp, self.folder = ocp, folder.absolute()
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs the trace of every thread of a failed save
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            # a state of some MB takes milliseconds, and what save() returned from is on disk
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,  # what a killed save left behind
            create=True,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save a state (a tree of arrays) and `progress` (JSON values) in one piece; drops the oldest of three.

        Raises:
            LraError: the disk is full or refuses; the checkpoints before this one are whole.
        """
        ocp, leaves = self.ocp, jax.tree.leaves(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), progress=ocp.args.JsonSave(json.loads(json.dumps(progress)))
        )
        # asked first, since a disk that fills up while orbax writes leaves traces of its threads on the terminal
        if shutil.disk_usage(self.folder).free < sum(leaf.nbytes for leaf in leaves) + SPARE_BYTES:
            raise self._refused(step, "the disk is full")
        try:
            self.manager.save(step, args=args, force=True)
        except (OSError, ValueError) as error:  # orbax wraps a full disk in ValueError
            for half_written in self.folder.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
            full = "RESOURCE_EXHAUSTED" in str(error)
            raise self._refused(step, "the disk is full" if full else " ".join(str(error).split())[:200]) from error

    def _refused(self, step: int, reason: str) -> LraError:
        free = shutil.disk_usage(self.folder).free // 2**20
        return LraError(
            f"cannot write the checkpoint of step {step} in {self.folder} ({free} MiB free): {reason}; "
            f"those before it are whole: make room and run the same command with resume=auto"
        )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None where there is none."""
        return self.manager.latest_step()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and progress of the newest checkpoint; `like` gives the tree, shapes and dtypes."""
        ocp = self.ocp
        leaves, treedef = jax.tree.flatten(like)
        target = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=leaf.sharding) for leaf in leaves]
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        restored = self.manager.restore(self.latest_step(), args=args)
        return jax.tree.unflatten(treedef, restored["state"]), restored["progress"]


def holds_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint, without the second that orbax takes to import."""
    return any(path.name.isdigit() for path in folder.glob("*"))
