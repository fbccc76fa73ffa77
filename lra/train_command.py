"""`lra train`: Hydra composes the config of each run, `lra.training` runs it, a table ends it."""

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lra.config.options import options
from lra.errors import ConfigError, LraError, PreemptedError
from lra.runs.console import configure_logging, discard_stdout

log = logging.getLogger(__name__)

HELP = """usage: lra train [KEY=VALUE ...] [-m KEY=A,B,C ...] [--cfg job]

Train one model on one task, then print other runs, reference lines and published results of the
task. `lra keys` describes all keys, --help KEY one of them, --cfg job prints their values.

  lra train experiment=listops/quick                       minutes on a CPU
  lra train task=listops model=stu model.num_filters=16 optim.lr=3e-3 trainer.steps=500 seed=3
  lra train -m task=listops_short model=stu,lru,transformer seed=0,1,2
  lra train -m ... hydra/launcher=joblib                   several runs at a time (extra: sweep);
                                                           submitit_slurm runs them on a cluster

  resume=auto            continue the run from its last checkpoint; skip it if it is finished
  output.root=DIR        folder of all runs (runs)
  data.root=DIR          publishers' files and prepared data ($LRA_DATA, else data)
"""


def train_command(argv: Sequence[str]) -> int:
    """Runs `lra train ARGV`; returns the exit code.

    Raises:
        LraError: of a single run. A sweep reports its errors and runs on.
    """
    if argv[:1] in (["-h"], ["--help"]) and argv[1:]:
        from lra.config.keys import describe_keys

        print(describe_keys(argv[1:]), end="")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        for group in ("experiment", "task", "model", "protocol", "size"):
            print(f"  {group + '=':<12} {', '.join(options(group))}")
        return 0 if argv else 2
    import hydra

    from lra.config.compose import normalize_overrides
    from lra.config.messages import translated_errors
    from lra.config.yaml_files import use_checked_files

    for word in argv:
        if match := re.match(r"--(task|model|protocol|experiment|size|debug|seed|resume)\b", word):
            raise ConfigError(f"{word}: config keys have no dashes; write {match[1]}=VALUE")
    argv = normalize_overrides(argv)
    sys.argv = ["lra train", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    use_checked_files()
    start = hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
    if {"-m", "--multirun"} & set(argv):
        return sweep(start, argv)
    errors: list[LraError] = []  # Hydra adds a line of its own to what a job raises

    def job(cfg) -> None:
        try:
            record = run_job(cfg)
        except LraError as error:
            errors.append(error)
            return
        from lra.training.distributed import is_first

        if is_first():
            print_table(cfg.output.root, record)

    with translated_errors(argv):
        start(job)()
    if errors:
        raise errors[0]
    return 0


def sweep(start, argv: Sequence[str]) -> int:
    """Runs a Hydra sweep, then prints the table of output.root; returns the exit code."""
    from lra.config.messages import translated_errors

    try:
        with translated_errors(argv):
            check_sweep(argv)
            start(sweep_job)()
    except LraError as error:
        log.error("%s", error)
        return error.exit_code
    finally:
        roots = [word.partition("=")[2] for word in argv if word.startswith("output.root=")]
        root = ["runs", *roots][-1]
        if Path(root).exists():  # otherwise no run began
            print_table(root)
    return 0


def check_sweep(argv: Sequence[str]) -> None:
    """Raises ConfigError if a range or a glob of the command line is empty: no run would start."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    words = [word for word in argv if "=" in word and word[0] != "-"]
    for override in OverridesParser.create().parse_overrides(words):
        value = override.value()
        if isinstance(value, Glob):
            # a folder of the user's own may have more options
            own = any("searchpath" in word or word.startswith(("--config", "-c")) for word in argv)
            found = own or value.filter(options(override.key_or_group))
        else:
            found = not override.is_range_sweep() or any(True for _ in override.sweep_iterator())
        if not found:
            raise ConfigError(f"{override.input_line} is empty, so the sweep has no runs")


def sweep_job(cfg) -> None:
    """One run of a sweep. Reports an error at once; after a signal, the sweep ends."""
    configure_logging()  # a launcher may call this in a new process
    try:
        run_job(cfg)
    except PreemptedError as stop:
        log.info("%s", stop)
        sys.exit(stop.exit_code)
    except LraError as error:
        log.error("%s", error)
        raise type(error)(
            "a run of the sweep failed, see above; the table counts those that finished"
        ) from None


def run_job(cfg) -> dict:
    """Runs the config that Hydra composed; returns the record."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lra.config.compose import finalize
    from lra.training.run import train

    hydra_cfg = HydraConfig.get()
    flags = []  # of the command that reproduces the run
    for source in hydra_cfg.runtime.config_sources:
        if source.provider == "command-line":
            folder = Path(source.path)
            inside = folder.is_relative_to(Path.cwd())
            flags += ["--config-dir", str(folder.relative_to(Path.cwd()) if inside else folder)]
    # with interpolations as typed
    words = cast(list[str], OmegaConf.to_container(hydra_cfg.overrides.task))
    return train(finalize(cfg, hydra_cfg.runtime.choices, words, flags))


def print_table(root: str, record: dict | None = None) -> None:
    """Prints runs, reference lines and published results of a task, or a sweep's table (`None`).

    Neither a closed stdout nor an error changes the exit code.
    """
    color = sys.stdout.isatty()
    try:
        from lra.report.tables import comparison_table, summary_after_run

        if record is None:
            text = comparison_table([root], published="best", color=color)
        else:
            text = summary_after_run(record, root, color=color)
    except Exception as error:
        log.warning("no table: %s: %s", type(error).__name__, error)
        return
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        discard_stdout()
