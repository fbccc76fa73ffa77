"""Checkpoints of a run: the latest two, written by Orbax and verified with SHA-256 checksums.

<step>/             Orbax checkpoint: the arrays of the state, and `Progress` as JSON
<step>/SHA256SUMS   checksums of all other files, in the format of sha256sum
<step>.damaged/     checkpoint with a wrong checksum; deleted after the next save
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
from typing import Any, NamedTuple, Required

import jax
import numpy as np
from jax.experimental import multihost_utils
from typing_extensions import TypedDict

from lra.errors import LraError, RunFolderError
from lra.files import disk_errors, write_atomically
from lra.runs.records import SCHEMA, Count, Record, Section, Selection, parse_json
from lra.training.distributed import is_first, is_peer_lost
from lra.training.memory import is_out_of_memory

log = logging.getLogger(__name__)

SPARE_BYTES = 2**20  # disk space for metadata, the record and the metrics
CHECKSUMS = "SHA256SUMS"


class BestStep(TypedDict):
    """The evaluation with the best accuracy on validation; -1 before the first one."""

    step: Count
    accuracy: float


class Generator(TypedDict):
    """`generator_settings`."""

    seed: Count
    kind: str
    partitionable: bool


class Progress(TypedDict, total=False):
    """What a checkpoint holds beside the arrays. Older versions lack some keys."""

    best: Required[BestStep]
    selection: Required[Selection | None]
    vocab: Required[list[str] | None]
    record: Section  # a `Record` without `schema`
    metrics_lines: Count  # lines that metrics.jsonl should have
    first_loss: float | None
    random: Generator


class Restored(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: Any
    progress: dict[str, Any]
    damaged: Sequence[int] = ()  # steps of newer checkpoints that are damaged


class Checkpoints:
    """The checkpoints `folder/<step>` of a run.

    Args:
        folder: created if absent.
        read_only: changes nothing on disk, for the folder of a run that may be live.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder, self.read_only = folder.absolute(), read_only

    @cached_property
    def manager(self) -> Any:
        """Orbax's manager, created on first use, because Orbax takes a second to import."""
        import orbax.checkpoint as ocp

        silence_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self.read_only else 2,
            # a state of a few MB takes milliseconds, and is on disk when save() returns
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not self.read_only,  # from saves that were killed
            create=not self.read_only,
            read_only=self.read_only,
        )
        with disk_errors(self.folder):
            return ocp.CheckpointManager(self.folder, options=options)

    def close(self) -> None:
        """Ends the manager's threads; may be called again."""
        if manager := vars(self).pop("manager", None):
            manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves a tree of arrays with `progress` (JSON values) and deletes the third latest.

        Raises:
            LraError: the disk is full or not writable; earlier checkpoints stay intact.
        """
        import orbax.checkpoint as ocp

        manager, leaves = self.manager, jax.tree.leaves(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            progress=ocp.args.JsonSave(json.loads(json.dumps(progress))),
        )
        # Check first: if a save fails, Orbax dumps stack traces of its threads.
        if not self.folder.is_dir():
            raise LraError(
                f"{self.folder} was removed during the run; the checkpoint of step {step} is not "
                "written, and the same command starts anew"
            )
        if shutil.disk_usage(self.folder).free < sum(leaf.nbytes for leaf in leaves) + SPARE_BYTES:
            raise self._save_error(step, "the disk is full")
        try:
            manager.save(step, args=args, force=True)
        except (OSError, ValueError) as error:  # TensorStore reports a full disk as ValueError
            for unfinished in self.folder.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise self._save_error(step, disk_problem(error)) from error
        if is_first():
            folder = self.folder / str(step)
            write_atomically(folder / CHECKSUMS, checksums(folder))
            for damaged in self.folder.glob("*.damaged"):
                shutil.rmtree(damaged, ignore_errors=True)

    def _save_error(self, step: int, reason: str) -> LraError:
        folder = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        free = shutil.disk_usage(folder).free // 2**20
        return LraError(
            f"cannot write the checkpoint of step {step} in {self.folder} ({free} MiB free): "
            f"{reason}; earlier checkpoints are intact: free some space and run the same command "
            f"with resume=auto"
        )

    def restore(self, like: Any) -> Restored | None:
        """Restores the newest intact checkpoint; None if there is no checkpoint.

        A damaged checkpoint is skipped with a warning.

        Args:
            like: tree of arrays with the shapes, dtypes and shardings of the result.

        Raises:
            RunFolderError: all checkpoints are damaged.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            # Verify first: Orbax misses bit flips, and dumps stack traces on truncated files.
            problem = find_corruption(self.folder / str(step))
            if problem is None:
                try:
                    state, progress = self._read(step, like)
                except Exception as error:  # TensorStore's drivers raise many types
                    if is_out_of_memory(error) or is_peer_lost(error):
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
            f"no checkpoint in {self.folder} can be read ({found}); "
            f"remove that folder to start anew"
        )

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree.flatten(like)
        target = [
            jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=leaf.sharding)
            for leaf in leaves
        ]
        progress = read_progress(self.folder / str(step))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        restored = self.manager.restore(step, args=args)
        return jax.tree.unflatten(treedef, restored["state"]), progress

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Warns of damaged checkpoints and renames them, so that their steps can be saved again."""
        for bad, problem in damaged.items():
            log.warning(
                f"the checkpoint of step {bad} in {self.folder} is damaged ({problem}); "
                f"step {step} is restored instead"
            )
        if not damaged or self.read_only:
            return
        # every process must have read the checkpoints before they are renamed
        multihost_utils.sync_global_devices("damaged checkpoints found")
        if is_first():
            for bad in damaged:
                target = self.folder / f"{bad}.damaged"
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self.folder / str(bad), target)
        self.manager.reload()


@cache
def silence_orbax() -> None:
    """Suppresses the stack traces that Orbax logs besides the exception that it raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    warnings.filterwarnings(
        "ignore", message="coroutine 'async_(de)?serialize", category=RuntimeWarning
    )
    previous_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # raised in threads that report to an event loop that the first error has closed
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    sys.unraisablehook = hook


def disk_problem(error: Exception) -> str:
    """Returns a few words for the cause of TensorStore's write error."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or os.strerror(errno.ENOSPC) in text:
        return "the disk is full"
    known = (
        os.strerror(code)
        for code in (errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    )
    return next((reason for reason in known if reason in text), text[:200])


def checkpoint_metadata(config: Mapping[str, Any], vocab: Sequence[str] | None) -> dict[str, Any]:
    """Returns the part of `progress` that describes the run of a checkpoint.

    The state of the random number generator is not saved: every random number is a function of the
    seed, the step and JAX's generator settings.
    """
    return {
        "vocab": vocab,
        "protocol": config["protocol"],
        "config": config,
        "random": generator_settings(config["seed"]),
    }


def generator_settings(seed: int) -> dict[str, Any]:
    """Returns the seed and JAX's settings that determine all random numbers of a run."""
    return {
        "seed": seed,
        "kind": jax.config.jax_default_prng_impl,  # type: ignore[attr-defined]
        "partitionable": jax.config.jax_threefry_partitionable,  # type: ignore[attr-defined]
    }


def check_metadata(folder: Path, progress: Mapping[str, Any], vocab: Sequence[str] | None) -> None:
    """Checks that a checkpoint in `folder` can be continued with this vocabulary and generator.

    Raises:
        RunFolderError: the vocabulary or JAX's generator settings differ.
    """
    if tuple(progress["vocab"] or ()) != tuple(vocab or ()):
        raise RunFolderError(
            f"{folder} was trained with another vocabulary; choose another output.root"
        )
    saved = progress.get("random")  # absent in checkpoints of older versions
    if saved and saved != generator_settings(saved["seed"]):
        raise RunFolderError(
            f"{folder} was trained with JAX's generator {saved['kind']}, partitionable "
            f"{saved['partitionable']}; set JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE "
            f"to these, or choose another output.root"
        )


def checksums(folder: Path) -> bytes:
    """Returns the SHA-256 of every file below `folder`, in the format of sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return "".join(
        f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files
    ).encode()


def find_corruption(folder: Path) -> str | None:
    """Returns the first problem of a checkpoint's files; None if intact or without checksums."""
    for path in folder.rglob("*"):  # a read of a pipe, by us or by Orbax, may never end
        if path.exists() and not (path.is_file() or path.is_dir()):
            return f"{path.relative_to(folder)} is not a regular file"
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        for line in lines:
            expected, _, name = line.partition("  ")
            if not name:
                return f"{CHECKSUMS} has changed"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError:
        # Killed before the checksums were written; Orbax renames only complete checkpoints.
        return None
    except (OSError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return None if lines else f"{CHECKSUMS} is empty"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_checkpoint(folder: Path) -> bool:
    """Returns whether `folder` holds a complete checkpoint, without importing Orbax."""
    return any(path.name.isdigit() for path in folder.glob("*"))


def read_progress(folder: Path) -> dict[str, Any]:
    """Returns the `Progress` of a checkpoint; raises OSError or ValueError if it is not valid."""
    progress = parse_json(Progress, (folder / "progress/metadata").read_bytes())
    if "record" in progress:
        parse_json(Record, json.dumps({"schema": SCHEMA, **progress["record"]}).encode())
    return progress


def newest_progress(folder: Path) -> tuple[int, dict[str, Any]]:
    """Returns step and `Progress` of the newest intact checkpoint, without importing Orbax.

    The dictionary is empty if there is none.
    """
    for step in sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True):
        if find_corruption(folder / str(step)) is None:
            try:
                return step, read_progress(folder / str(step))
            except (OSError, ValueError):
                continue
    return 0, {}
