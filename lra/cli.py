"""The `lra` command. Each command imports what it needs when it runs, so that `lra --help` answers at once."""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from lra.config.options import CONF
from lra.errors import ConfigError, LraError, PreemptedError
from lra.training.preemption import Signals

SENTENCE_END = r"(?<=\.) (?!\d)"  # not that of "Tay et al. 2020"

DIAGNOSE_HELP = """What a trained run relies on. Prints small tables and adds them to RUN_FOLDER/diagnostics.json.

  factors       accuracy by label, length and what else the task knows (ListOps: depth, root operator); the default
  length        the weights at another length: length task.min_length=129,257 task.max_length=256,512
  permutation   accuracy when blocks of 1, 4, 16, ... positions stand in random order
  locality      accuracy of the mean over windows of 16, 64, ... positions, each read by itself

What exactly is measured: docs/diagnose.md."""

BENCH_HELP = """Measures speed and memory on this machine.

  data         preparation of the tasks' data, batches on the host
  ops          operations of the models beside the published order of the same computation
  trainer      training steps of `lra train` beside a bare jitted step, and the time of a start;
               KEY=VALUE as for lra train choose the config
  efficiency   speed and memory of models over lengths;
               'models=[A,B]' 'seq_lens=[N,M]' batch_size=N, or preset=lru_paper;
               train.KEY=VALUE sets a key of the config that is trained

Docs: docs/speed.md."""

TRAIN_HELP = """usage: lra train [KEY=VALUE ...] [-m KEY=A,B,C ...] [--cfg job]

Train one model on one task and print the comparison table. Every key of conf/ can be set; --cfg job prints them all.

  lra train experiment=listops/quick                       minutes on a CPU
  lra train task=listops model=stu model.num_filters=16 optim.lr=3e-3 trainer.steps=500 seed=3
  lra train -m task=listops_short model=stu,lru,transformer seed=0,1,2
  lra train -m ... hydra/launcher=joblib                   several at a time (extra: sweep); submitit_slurm on a cluster

  resume=auto            continue this run if its folder holds a checkpoint; skip it if it is finished
  output.root=DIR        where runs are kept (runs)
  data.root=DIR          publishers' files and prepared data ($LRA_DATA, else data)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code.

    0 done, 1 something else, 2 bad config, 3 bad data, 4 folder in use, 5 diverged, 6 not reproduced, 75 stopped and saved,
    130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:
            return train_command(argv[1:])
        if hasattr(signal, "SIGPIPE"):  # `lra table | head` ends quietly; a run outlives its reader
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        args = parsed(argv or ["--help"])
        with Signals():  # SIGTERM cleans up as Ctrl-C does
            return args.run(args)
    except LraError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        go_on = "the same command goes on with what is finished"
        if argv[:1] == ["train"]:
            go_on = "the same command with resume=auto goes on from the last checkpoint, if there is one"
        return fail(str(error) or f"interrupted; {go_on}", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return fail(
            f"{error.filename or 'output'}: the disk is full; free some space or set output.root and data.root",
            1,
        )


def fail(message: str, code: int) -> int:
    print(f"lra: error: {message}", file=sys.stderr)
    return code


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """What was typed; KEY=VALUE may also stand behind options, where argparse would not look for it."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    words = [
        word for word in rest if word[0] != "-" and ("=" in word or hasattr(args, "takes_words"))
    ]
    if rest and (not hasattr(args, "overrides") or words != rest):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lra", description="Long Range Arena in JAX.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    commands.add_parser("train", help="train a model on a task: lra train task=listops model=stu")

    data = commands.add_parser("data", help="prepare and inspect the tasks' data")
    actions = data.add_subparsers(metavar="ACTION", required=True)
    prepare = actions.add_parser(
        "prepare", help="generate or read the data of tasks into the packed store"
    )
    verify = actions.add_parser(
        "verify", help="recompute hashes, counts, balance; report defects and overlaps"
    )
    info = actions.add_parser(
        "info", help="what a task is, where its files and its packed store are; prepares nothing"
    )
    show = actions.add_parser("show", help="print some examples; pictures also as a PNG")
    for action, run in (
        (prepare, data_prepare),
        (verify, data_verify),
        (info, data_info),
        (show, data_show),
    ):
        action.add_argument(
            "tasks",
            nargs="+",
            metavar="TASK",
            help="a name that `lra tasks` lists; KEY=VALUE as for `lra train`",
        )
        action.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="config overrides, as for `lra train`",
        )
        if action is not info:
            action.add_argument(
                "--download", action="store_true", help="fetch the publisher's files where missing"
            )
            action.add_argument(
                "--allow-partial",
                action="store_true",
                help="take fewer examples than there should be",
            )
        action.set_defaults(run=run)
    prepare.add_argument(
        "--tfds",
        action="store_true",
        help="also as a TFDS dataset (array_record) under data.root/tfds",
    )
    prepare.add_argument(
        "--export", metavar="DIR", type=Path, help="also in the release's own file format"
    )
    show.add_argument("-n", type=int, default=5, help="how many examples (5)")
    show.add_argument(
        "--split", choices=("train", "val", "test"), default="train", help="of which split (train)"
    )
    show.add_argument(
        "--png", metavar="FILE", type=Path, help="where the pictures go (data.root/shown/TASK.png)"
    )

    commands.add_parser("tasks", help="list the tasks").set_defaults(run=list_options, group="task")
    models = commands.add_parser(
        "models", help="list the models; with task=NAME their parameters, operations and state"
    )
    models.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="a task, and what else `lra train` takes; model=A,B shows these alone",
    )
    models.add_argument(
        "--format", choices=("terminal", "markdown", "latex", "csv"), default="terminal"
    )
    models.set_defaults(run=models_command, group="model")

    evaluate = commands.add_parser(
        "eval", help="score a run's saved weights again and compare with what it recorded"
    )
    evaluate.add_argument(
        "folder",
        metavar="RUN_FOLDER",
        type=Path,
        help="the folder of one run, as `lra train` printed it",
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="data.root, data.download, trainer.eval_batch_size, ...",
    )
    evaluate.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="which split (test)"
    )
    evaluate.add_argument(
        "--weights", choices=("best", "last"), help="which weights (those that the protocol scores)"
    )
    evaluate.set_defaults(run=eval_command)

    diagnose = commands.add_parser(
        "diagnose",
        help="accuracy of a run by length, depth, ...; at other lengths; without order; without distance",
        description=DIAGNOSE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    diagnose.add_argument(
        "folder", metavar="RUN_FOLDER", type=Path, help="the folder of one run with its checkpoint"
    )
    diagnose.add_argument(
        "overrides",
        nargs="*",
        metavar="WHAT | KEY=VALUE",
        help="diagnostics (factors); task.KEY=VALUE[,VALUE ...] for length; data.root and what else lra eval takes",
    )
    diagnose.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="which split (test)"
    )
    diagnose.add_argument(
        "--examples", type=int, metavar="N", help="its first N examples (those that the run scored)"
    )
    diagnose.add_argument(
        "--weights", choices=("best", "last"), help="which weights (those that the protocol scores)"
    )
    diagnose.add_argument(
        "--sizes",
        metavar="A,B,...",
        help="of blocks and windows (1 or 16, times 4, up to the length)",
    )
    diagnose.add_argument(
        "--plot", metavar="FILE", type=Path, help="also draw the tables: png, pdf or svg"
    )
    diagnose.set_defaults(run=diagnose_command, takes_words=True)

    table = commands.add_parser(
        "table", help="compare runs with each other and with published numbers"
    )
    table.add_argument(
        "paths", nargs="*", default=["runs"], help="folders that hold runs, or record files (runs)"
    )
    table.add_argument("--task", action="append", help="only this task; repeatable")
    table.add_argument("--model", action="append", help="only this model; repeatable")
    table.add_argument("--protocol", help="only this protocol")
    table.add_argument(
        "--published",
        choices=("featured", "all", "none"),
        default="featured",
        help="published rows",
    )
    table.add_argument(
        "--csv", action="append", default=[], metavar="FILE", help="rows of your own; repeatable"
    )
    table.add_argument(
        "--format", choices=("terminal", "markdown", "latex", "csv"), default="terminal"
    )
    table.add_argument("--output", metavar="FILE", help="also write the table here")
    table.add_argument(
        "--metric", choices=("test", "val"), default="test", help="which split's accuracy (test)"
    )
    table.set_defaults(run=comparison_table)

    plot = commands.add_parser("plot", help="draw the learning curves of finished runs")
    plot.add_argument("paths", nargs="*", default=["runs"], help="folders that hold runs (runs)")
    plot.add_argument("--task", action="append", help="only this task; repeatable")
    plot.add_argument(
        "--output", metavar="FILE", default="curves.png", help="png, pdf or svg (curves.png)"
    )
    plot.set_defaults(run=plot_command)

    bench = commands.add_parser(
        "bench",
        help="measure speed and memory on this machine",
        description=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("suite", choices=("data", "ops", "trainer", "efficiency"))
    bench.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="trainer: the config to train; efficiency: keys of conf/bench/efficiency.yaml",
    )
    bench.add_argument(
        "--data-root",
        metavar="DIR",
        help="data: folder of the publishers' files ($LRA_DATA, else data)",
    )
    bench.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="write the result as JSON; efficiency writes bench_efficiency.json by default, "
        "with .md, .tex and .png beside it",
    )
    bench.add_argument(
        "--fresh", action="store_true", help="efficiency: measure again what the file holds"
    )
    bench.set_defaults(run=bench_command)

    doctor = commands.add_parser("doctor", help="versions, devices, data found, W&B state")
    doctor.add_argument(
        "--data-root",
        default=None,
        metavar="DIR",
        help="where to look for data ($LRA_DATA, else data)",
    )
    doctor.set_defaults(run=doctor_command)
    return top


def train_command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(TRAIN_HELP)
        for group in ("experiment", "task", "model", "protocol"):
            names = sorted(
                str(f.relative_to(CONF / group).with_suffix(""))
                for f in (CONF / group).rglob("*.yaml")
            )
            print(f"  {group + '=':<12} {', '.join(names)}")
        return 0 if argv else 2
    import hydra

    from lra.config.compose import normalize_overrides
    from lra.config.messages import translated_errors

    for word in argv:
        if match := re.match(r"--(task|model|protocol|experiment|debug|seed|resume)\b", word):
            raise ConfigError(f"{word}: config keys have no dashes; write {match[1]}=VALUE")
    argv = normalize_overrides(argv)
    sys.argv = ["lra train", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to the terminal
    start = hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
    if not {"-m", "--multirun"} & set(argv):
        with translated_errors(argv):
            start(job)()
        return 0
    try:
        with translated_errors(argv):
            start(sweep_job)()
    except LraError as error:
        return fail(str(error), error.exit_code)
    finally:
        root = [
            "runs",
            *(word.partition("=")[2] for word in argv if word.startswith("output.root=")),
        ][-1]
        if Path(root).exists():  # else no run began
            print_table([root], None)
    return 0


def job(cfg) -> None:
    """One run, from Hydra: train, then print the table of its task. Exits, since Hydra prints what is raised."""
    try:
        record = run_job(cfg)
    except LraError as error:
        sys.exit(fail(str(error), error.exit_code))
    from lra.training.distributed import is_first

    if is_first():
        print_table([cfg.output.root], [record["task"]])


def sweep_job(cfg) -> None:
    """One run of a sweep. An error is shown at once; the sweep goes on with the other runs, unless it was a signal."""
    try:
        run_job(cfg)
    except LraError as error:
        code = fail(str(error), error.exit_code)
        if isinstance(error, PreemptedError):
            sys.exit(code)
        raise type(error)(
            "a run of the sweep failed, see above; the table counts those that finished"
        ) from None


def run_job(cfg) -> dict:
    from hydra.core.hydra_config import HydraConfig

    from lra.config.compose import finalize
    from lra.training.trainer import train

    hydra_cfg = HydraConfig.get()
    folders = [
        Path(source.path)
        for source in hydra_cfg.runtime.config_sources
        if source.provider == "command-line"
    ]
    shown = [
        folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        for folder in folders
    ]
    flags = [word for folder in shown for word in ("--config-dir", str(folder))]
    return train(finalize(cfg, hydra_cfg.runtime.choices, hydra_cfg.overrides.task, flags))


def print_table(paths: Sequence[str], tasks: list[str] | None) -> None:
    from lra.report.tables import comparison_table

    print(comparison_table(paths, tasks=tasks, color=sys.stdout.isatty()), end="")


def comparison_table(args: argparse.Namespace) -> int:
    from lra.report.tables import comparison_table

    missing = [path for path in args.paths if path != "runs" and not Path(path).exists()]
    if missing:
        raise ConfigError(
            f"{missing[0]}: no such folder; name one that holds runs (runs is the default)"
        )
    text = comparison_table(
        args.paths,
        tasks=args.task,
        models=args.model,
        protocol=args.protocol,
        published=args.published,
        csv=args.csv,
        format=args.format,
        output=args.output,
        metric=args.metric,
        color=args.format == "terminal" and sys.stdout.isatty(),
    )
    print(text, end="")
    return 0


def plot_command(args: argparse.Namespace) -> int:
    from lra.report.plots import curves

    print(curves(args.paths, args.output, args.task))
    return 0


def eval_command(args: argparse.Namespace) -> int:
    from lra.report.evaluate import evaluate_run

    print(
        evaluate_run(args.folder, split=args.split, weights=args.weights, overrides=args.overrides)
    )
    return 0


def diagnose_command(args: argparse.Namespace) -> int:
    from lra.report.diagnose import diagnose

    try:
        sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else None
    except ValueError:
        raise ConfigError(
            f"--sizes {args.sizes}: expected whole numbers such as 1,16,256"
        ) from None
    options = {
        "split": args.split,
        "examples": args.examples,
        "weights": args.weights,
        "sizes": sizes,
    }
    tables: dict = {}
    for name, found, text in diagnose(args.folder, args.overrides, **options):
        print(text, end="\n\n", flush=True)
        tables |= {f"{name}: {heading}": rows for heading, rows in found.items()}
    if args.plot:
        from lra.report.plots import draw_tables

        print(f"{draw_tables(tables, args.plot)}")
    return 0


def list_options(args: argparse.Namespace) -> int:
    """Names with the first sentence of the comment on top of their YAML."""
    for file in sorted((CONF / args.group).glob("*.yaml")):
        head = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
        about = " ".join(line.removeprefix("#").strip() for line in head)
        about = about.removeprefix(f"conf/{args.group}/{file.name} -- ")
        print(f"{file.stem:<19} {re.split(SENTENCE_END, about)[0]}")
    return 0


def models_command(args: argparse.Namespace) -> int:
    if not args.overrides:
        return list_options(args)
    from lra.report.models import table

    print(table(args.overrides, args.format), end="")
    return 0


def composed(args: argparse.Namespace):
    """(config, task) of each named task."""
    from lra.config.build import build_task
    from lra.config.compose import compose

    flags = ("download", "allow_partial")
    switches = [f"data.{flag}=true" for flag in flags if getattr(args, flag, False)]
    names = [word for word in args.tasks if "=" not in word]
    overrides = [word for word in args.tasks if "=" in word]  # as `lra train` takes them
    if not names:
        raise ConfigError(f"no task named; write lra data ACTION TASK {' '.join(overrides)}")
    for name in names:
        cfg = compose([f"task={name}", *switches, *overrides, *args.set])
        yield cfg, build_task(cfg)


def prepared(args: argparse.Namespace):
    """(task, store, data root) of each named task, prepared where it is not yet."""
    from lra.config.build import data_arguments
    from lra.data.store import prepare
    from lra.runs.progress import preparing

    for cfg, task in composed(args):
        yield (
            task,
            preparing(task, partial(prepare, task, **data_arguments(cfg))),
            Path(cfg.data.root),
        )


def data_prepare(args: argparse.Namespace) -> int:
    from lra.files import disk_errors

    if args.export:
        check_export(args)
    for task, store, root in prepared(args):
        counts = ", ".join(f"{name} {len(split):,}" for name, split in store.splits.items())
        partial_data = ", PARTIAL" if store.manifest["partial"] else ""
        print(f"{task.name}: {store.manifest['source']}{partial_data}, {counts}, in {store.path}")
        for note in store.manifest["notes"]:
            print(f"  note: {note}")
        if args.tfds:
            import tensorflow_datasets as tfds

            from lra.data.tfds_builder import builder

            tfds.disable_progress_bar()
            made = builder(task, root / "tfds", store)
            with disk_errors(root / "tfds", "data.root"):
                made.download_and_prepare(file_format="array_record")
            print(f"{task.name}: TFDS dataset {made.info.full_name} in {made.data_path}")
        if args.export:
            with disk_errors(args.export, "--export"):
                print(f"{task.name}: release files in {task.export(store.splits, args.export)}")
    return 0


def check_export(args: argparse.Namespace) -> None:
    """Refuse before hours of preparation what could not be exported after them."""
    from lra.tasks.base import Task

    for _, task in composed(args):
        if type(task).export is Task.export:
            task.export({}, args.export)  # says so


def data_verify(args: argparse.Namespace) -> int:
    from lra.data.inspect import verify_lines

    sound = True
    for task, store, _ in prepared(args):
        for line, problem in verify_lines(task, store):
            print(line)
            sound = sound and not problem
    return 0 if sound else 3


def data_info(args: argparse.Namespace) -> int:
    from lra.data.inspect import info_lines

    for cfg, task in composed(args):
        print("\n".join(info_lines(task, cfg.protocol.name, Path(cfg.data.root))))
    return 0


def data_show(args: argparse.Namespace) -> int:
    from lra.data.inspect import show_lines, write_sheet
    from lra.files import disk_errors

    if args.n < 1:
        raise ConfigError(f"-n {args.n}: expected 1 or more")
    for task, store, root in prepared(args):
        split = store.splits[args.split]
        print("\n".join(show_lines(task, args.split, split, args.n)))
        if task.picture_shape:
            file = args.png or root / "shown" / f"{task.name}.png"
            with disk_errors(file, "--png"):
                print(f"{task.name}: as a picture in {write_sheet(task, split, args.n, file)}")
    return 0


def bench_command(args: argparse.Namespace) -> int:
    if args.suite == "efficiency":
        return efficiency_command(args)
    if args.fresh:
        raise ConfigError("--fresh is for lra bench efficiency; the other suites keep nothing")
    if args.overrides and args.suite != "trainer":
        raise ConfigError(
            f"lra bench {args.suite} takes no {args.overrides[0]}; "
            f"trainer and efficiency take KEY=VALUE words"
        )
    from lra.bench import measurement

    if args.suite == "data":
        from lra.bench import data

        measurements = data.measure(data_root_of(args))
    elif args.suite == "ops":
        from lra.bench import ops

        measurements = ops.measure()
    else:
        from lra.bench import trainer

        measurements = trainer.measure(args.overrides)
    result = measurement.make_result(args.suite, measurements, device=args.suite != "data")
    print(measurement.to_markdown(result), end="")
    if args.output:
        measurement.save(result, args.output)
    return 0


def efficiency_command(args: argparse.Namespace) -> int:
    from lra.bench.efficiency import run
    from lra.bench.efficiency_table import make_table
    from lra.report.formats import render

    file = args.output or Path("bench_efficiency.json")
    if file.suffix != ".json":
        raise ConfigError(
            f"--output {file}: expected a name that ends in .json; .md, .tex and .png go beside it"
        )
    result = run(args.overrides, file, fresh=args.fresh, report=partial(print, flush=True))
    print(render(make_table(result)), end="")
    print(f"saved in {file}, with .md, .tex and, over lengths, .png beside it")
    return 0


def data_root_of(args: argparse.Namespace) -> Path:
    return Path(args.data_root or os.environ.get("LRA_DATA", "data"))


def doctor_command(args: argparse.Namespace) -> int:
    from lra.report.doctor import report

    print(report(data_root_of(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
