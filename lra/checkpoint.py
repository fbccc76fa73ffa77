"""Saved states of a run: the last two to resume from, and the weights that were best on validation. Orbax does the writing."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lra.errors import LraError


class Checkpoints:
    """Orbax checkpoints below `folder`: `last/<step>` and `best/<step>`, each complete or absent."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.ocp, self.folder = ocp, folder.absolute()

        def manager(name: str, keep: int):
            # synchronous: a state of some MB takes milliseconds, and what save() returned from is on disk
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
            return ocp.CheckpointManager(self.folder / name, options=options)

        self.last, self.best = manager("last", 2), manager("best", 1)

    def save(self, step: int, state: Any, progress: dict) -> None:
        """Save what a resumed run needs: the state (a tree of arrays) and `progress` (JSON values)."""
        self._save(self.last, step, state, progress)

    def save_best(self, step: int, weights: Any) -> None:
        """Keep `weights` in place of the best so far."""
        self._save(self.best, step, weights, {})

    def _save(self, manager, step: int, tree: Any, extra: dict) -> None:
        ocp = self.ocp
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.leaves(tree)),
            progress=ocp.args.JsonSave(json.loads(json.dumps(extra))),
        )
        try:
            if step in manager.all_steps():  # written before a kill and reached again: the same values
                manager.delete(step)
            manager.save(step, args=args, force=True)
        except (OSError, ValueError) as error:  # orbax wraps a full disk in ValueError
            free = shutil.disk_usage(self.folder).free // 2**20
            detail = " ".join(str(error).split())[:200]
            raise LraError(
                f"cannot write the checkpoint of step {step} in {self.folder} ({free} MiB free): {detail}; "
                f"the checkpoints before it are whole: make room and run the same command with resume=auto"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None where there is none."""
        return self.last.latest_step()

    def restore(self, like: Any) -> tuple[Any, dict]:
        """State and progress of the newest checkpoint; `like` gives the tree, shapes and dtypes."""
        return self._restore(self.last, self.last.latest_step(), like)

    def restore_best(self, like: Any) -> Any:
        return self._restore(self.best, self.best.latest_step(), like)[0]

    def _restore(self, manager, step: int, like: Any) -> tuple[Any, dict]:
        ocp = self.ocp
        leaves, treedef = jax.tree.flatten(like)
        target = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=leaf.sharding) for leaf in leaves]
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        restored = manager.restore(step, args=args)
        return jax.tree.unflatten(treedef, restored["state"]), restored["progress"]

    def close(self) -> None:
        self.last.close()
        self.best.close()
