"""The `lra` command. A subcommand imports its modules when it runs: `lra --help` is fast."""

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from lra.config.options import CONF
from lra.errors import ConfigError, LraError, MismatchError, PreemptedError
from lra.files import disk_errors
from lra.runs.console import configure_logging, discard_stdout, printable
from lra.train_command import train_command
from lra.training.preemption import Signals

log = logging.getLogger("lra.cli")

FORMATS = ("terminal", "markdown", "latex", "csv")
SPLITS = ("test", "val", "train")

DIAGNOSE_HELP = """Measures what a trained run relies on; tables also go to diagnostics.json.

  factors       accuracy by label, length and the task's own factors (the default)
  length        accuracy at other lengths: length task.min_length=129,257 task.max_length=256,512
  permutation   accuracy with blocks of 1, 4, 16, ... positions in random order
  locality      accuracy of the mean prediction over windows of 16, 64, ... positions

Definitions: docs/diagnose.md."""

COMPARE_HELP = """Compares models by the test predictions of their runs.

  lra compare runs/image/stu runs/image/lru   two folders: the seeds of one model against the other
  lra compare runs --task image               one folder: every pair of its models
  lra compare runs --plot ranks.png           mean ranks over tasks, critical-difference diagram

Methods: docs/tables.md."""

BENCH_SUITES = {
    "data": (
        "preparation of the tasks' data, batches on the host",
        "Measures without JAX: reading and packing examples, generators, batches on the host.",
    ),
    "ops": (
        "operations of the models beside the published order of the same computation",
        "Measures time and memory of STU, recurrences and attention, forward and backward.",
    ),
    "trainer": (
        "training steps of `lra train` beside a bare jitted step, and the time of a start",
        "Measures the same steps four ways; KEY=VALUE as for `lra train` choose the config.",
    ),
    "efficiency": (
        "speed and memory of models over lengths",
        "Measures one cell for each model and length, each in a process of its own.\n\n"
        "  lra bench efficiency 'models=[stu,lru]' 'seq_lens=[1024,2048]' batch_size=8\n"
        "  lra bench efficiency preset=lru_paper --output lru_paper.json\n\n"
        "train.KEY=VALUE sets a key of the config that is trained.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 success, 1 other errors, 2 config, 3 data, 4 run folder in use, 5 diverged, 6 not reproduced,
    75 stopped after saving, 130 interrupted, 141 stdout closed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    configure_logging()
    try:
        if argv[:1] == ["train"]:
            code = train_command(argv[1:])
        else:
            args = parse(argv or ["--help"])
            with Signals():  # SIGTERM cleans up as Ctrl-C does
                code = args.run(args)
        sys.stdout.flush()
        return code
    except PreemptedError as stop:  # not an error: the same command continues
        log.info("%s", stop)
        return stop.exit_code
    except LraError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt as error:
        hint = "the same command continues after its finished parts"
        if argv[:1] == ["train"]:
            hint = "the same command with resume=auto continues from the last checkpoint, if any"
        log.info("%s", str(error) or f"interrupted; {hint}")
        return 130
    except BrokenPipeError:  # lra table | head
        discard_stdout()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "output"
        log.error("%s: the disk is full; free some space or set output.root and data.root", place)
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. KEY=VALUE may also follow options, which argparse alone rejects."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    valid = (word[0] != "-" and ("=" in word or hasattr(args, "takes_words")) for word in rest)
    if rest and not (hasattr(args, "overrides") and all(valid)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


class Parser(argparse.ArgumentParser):
    """Adds the nearest valid word to the error for an unknown one."""

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"invalid choice: '(.*?)'( \(choose from (.*)\))", message):
            from lra.config.messages import nearest

            hint = nearest(match[1], re.findall(r"[\w-]+", match[3]))
            message = message.replace(match[2], f"{hint}{match[2]}")
        super().error(message)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="lra", description="Long Range Arena in JAX.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    add = partial(add_command, commands)

    commands.add_parser("train", help="train a model on a task: lra train task=listops model=stu")
    add_data_commands(commands.add_parser("data", help="prepare and inspect the tasks' data"))

    keys = add("keys", keys_command, "list the config keys: default, valid values, help")
    keys.add_argument(
        "prefixes", nargs="*", metavar="PREFIX", help="keys or sections, such as optim (all)"
    )

    add("tasks", list_options, "list the tasks").set_defaults(group="task")
    models = add("models", models_command, "list the models; with task=NAME their costs")
    models.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="task=NAME and other keys of `lra train`; model=A,B selects models",
    )
    models.add_argument("--format", choices=FORMATS, default="terminal")
    models.set_defaults(group="model")

    experiments = add(
        "experiments", experiments_command, "published scores, our runs and costs of experiments"
    )
    experiments.add_argument(
        "tasks", nargs="*", metavar="TASK", help="list the experiments of these tasks (a matrix)"
    )
    experiments.add_argument(
        "--runs",
        action="append",
        default=[],
        metavar="ROOT",
        help="folder of runs, beside results/runs; repeatable",
    )
    experiments.add_argument("--format", choices=FORMATS, default="terminal")

    evaluate = add("eval", eval_command, "score a run's saved weights; compare with its record")
    add_saved_run(evaluate, "KEY=VALUE", "data.root, data.download, trainer.eval_batch_size, ...")

    diagnose = add(
        "diagnose",
        diagnose_command,
        "a run's accuracy by length, depth, ...; at other lengths; on permuted or local input",
        description=DIAGNOSE_HELP,
    )
    add_saved_run(
        diagnose,
        "WHAT | KEY=VALUE",
        "diagnostics (factors); task.KEY=VALUE[,VALUE ...] for length; keys of `lra eval`",
    )
    diagnose.add_argument(
        "--examples", type=int, metavar="N", help="N examples of the split (those the run scored)"
    )
    diagnose.add_argument(
        "--sizes",
        metavar="A,B,...",
        help="sizes of blocks and windows (1 or 16, times 4, up to the length)",
    )
    diagnose.add_argument(
        "--plot", metavar="FILE", type=Path, help="also plot the tables: png, pdf or svg"
    )
    diagnose.set_defaults(takes_words=True)

    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument(
        "paths", nargs="*", default=["runs"], help="folders that hold runs, or record files (runs)"
    )
    runs.add_argument("--task", action="append", help="only this task; repeatable")
    table = add("table", comparison_table, "compare runs and published numbers", parents=[runs])
    table.add_argument("--model", action="append", help="only this model; repeatable")
    table.add_argument("--protocol", help="only this protocol")
    table.add_argument(
        "--published",
        choices=("featured", "best", "all", "unverified", "none"),
        help="published rows: of known models (featured, the default), the best of each task, "
        "all, also unverified ones",
    )
    table.add_argument(
        "--configs",
        action="store_true",
        help="list all configurations: what differs, seeds, validation and test accuracy",
    )
    table.add_argument(
        "--csv", action="append", default=[], metavar="FILE", help="rows of your own; repeatable"
    )
    table.add_argument("--format", choices=FORMATS, default="terminal")
    table.add_argument("--output", metavar="FILE", help="also write the table to FILE")
    table.add_argument("--metric", choices=("test", "val"), help="accuracy of this split (test)")

    compare = add(
        "compare",
        compare_command,
        "paired tests of two models or folders; ranks of several over tasks",
        description=COMPARE_HELP,
    )
    compare.add_argument("paths", nargs="+", metavar="PATH", help="one or two folders of runs")
    for option in ("task", "model"):
        compare.add_argument(f"--{option}", action="append", help=f"only this {option}; repeatable")
    compare.add_argument("--protocol", help="only this protocol")
    compare.add_argument(
        "--plot", metavar="FILE", help="critical-difference diagram of 3 or more models"
    )

    plot = add("plot", plot_command, "plot the learning curves of runs", parents=[runs])
    plot.add_argument(
        "--output", metavar="FILE", default="curves.png", help="png, pdf or svg (curves.png)"
    )

    data_root = argparse.ArgumentParser(add_help=False)
    data_root.add_argument(
        "--data-root",
        metavar="DIR",
        type=Path,
        default=Path(os.environ.get("LRA_DATA", "data")),
        help="data folder ($LRA_DATA, else data)",
    )
    bench = commands.add_parser("bench", help="measure speed and memory on this machine")
    suites = bench.add_subparsers(metavar="SUITE", required=True)
    for name, (about, details) in BENCH_SUITES.items():
        description = f"{details}\n\nDocs: docs/speed.md."
        parents = [data_root] if name == "data" else []
        suite = add_command(
            suites, name, bench_command, about, parents=parents, description=description
        )
        suite.set_defaults(suite=name)
        suite.add_argument(
            "--output",
            metavar="FILE",
            type=Path,
            help="write the result as JSON"
            + (" (bench_efficiency.json), .md, .tex and .png" * (name == "efficiency")),
        )
        if name in ("trainer", "efficiency"):
            where = "of `lra train`" if name == "trainer" else "of conf/bench/efficiency.yaml"
            suite.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"keys {where}")
        if name == "efficiency":
            suite.set_defaults(run=efficiency_command)
            suite.add_argument("--fresh", action="store_true", help="measure every cell again")

    suite = add("suite", suite_command, "the same tasks, tuning and seeds for every model")
    suite.add_argument("action", choices=("list", "run", "status", "table"))
    suite.add_argument(
        "name", nargs="?", metavar="SUITE", help="a name that `lra suite list` shows"
    )
    suite.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="task=A,B  model=A,B  output.root=DIR"
    )
    suite.add_argument("--format", choices=FORMATS, default="terminal")

    check = add(
        "check",
        check_command,
        "derive the claims of records again: scores, data, selection, weights; code 6 if one fails",
        parents=[data_root],
    )
    check.add_argument("paths", nargs="+", metavar="PATH", help="run folders, or folders of runs")
    check.add_argument(
        "--rescore",
        type=int,
        metavar="N",
        help="score test again with the weights of N runs (all that kept their weights)",
    )
    add_allow_target(check)

    studies = add(
        "reproduce",
        reproduce_command,
        "make the figures of the STU paper; without a name, list them",
    )
    studies.add_argument("names", nargs="*", metavar="NAME", help="studies, or all")
    studies.add_argument("--quick", action="store_true", help="tiny sizes, to try the command")
    studies.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="a folder for each study is replaced below DIR (results/reproduce; with --quick "
        "results/reproduce_quick)",
    )
    studies.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="also this")

    add("doctor", doctor_command, "versions, devices, data, W&B", parents=[data_root])
    return top


def add_command(commands, name: str, run, help: str, **options) -> argparse.ArgumentParser:
    """Adds a subcommand that calls `run(args)`."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=help, formatter_class=raw, **options)
    command.set_defaults(run=run)
    return command


def add_saved_run(command: argparse.ArgumentParser, metavar: str, overrides: str) -> None:
    """Arguments of commands that load the weights of a run."""
    command.add_argument(
        "folder", metavar="RUN_FOLDER", type=Path, help="a run folder, as `lra train` printed it"
    )
    command.add_argument("overrides", nargs="*", metavar=metavar, help=overrides)
    command.add_argument("--split", choices=SPLITS, default="test", help="split to score (test)")
    command.add_argument(
        "--weights", choices=("best", "last"), help="weights to score (as the protocol selects)"
    )
    add_allow_target(command)


def add_allow_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-target",
        action="append",
        default=[],
        metavar="CLASS",
        help="run the code of this class, such as mymodel.Model, if the record names it; "
        "repeatable (classes of this package only)",
    )


def add_data_commands(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(metavar="ACTION", required=True)

    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "overrides", nargs="+", metavar="TASK", help="a name that `lra tasks` lists, or KEY=VALUE"
    )
    chosen.set_defaults(takes_words=True)
    chosen.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="config overrides, as for `lra train`",
    )
    add = partial(add_command, actions, parents=[chosen])
    prepare = add("prepare", data_prepare, "generate or read data into the packed store")
    verify = add("verify", data_verify, "recompute hashes, counts, balance; report defects")
    add("info", data_info, "describe a task, its files and its packed store; prepares nothing")
    show = add("show", data_show, "print some examples; images also as a PNG")
    for action in (prepare, verify, show):
        action.add_argument("--download", action="store_true", help="download the missing files")
        action.add_argument(
            "--allow-partial", action="store_true", help="accept fewer examples than published"
        )
    prepare.add_argument(
        "--tfds", action="store_true", help="also write a TFDS dataset under data.root/tfds"
    )
    prepare.add_argument(
        "--export", metavar="DIR", type=Path, help="also write the release's own file format"
    )
    show.add_argument("-n", "--n", type=int, default=5, help="number of examples (5)")
    show.add_argument("--split", choices=SPLITS, default="train", help="split to show (train)")
    show.add_argument("--png", metavar="FILE", type=Path, help="image (data.root/shown/TASK.png)")


def comparison_table(args: argparse.Namespace) -> int:
    from lra.report.tables import comparison_table

    check_folders(args.paths)
    options = {"published": args.published, "csv": args.csv, "metric": args.metric}
    given = {name: value for name, value in options.items() if value}
    if args.configs and given:
        raise ConfigError(f"--configs lists configurations of runs; drop --{next(iter(given))}")
    text = comparison_table(
        args.paths,
        configs=args.configs,
        tasks=args.task,
        models=args.model,
        protocol=args.protocol,
        format=args.format,
        output=args.output,
        color=args.format == "terminal" and sys.stdout.isatty(),
        **given,
    )
    print(text, end="")
    return 0


def check_folders(paths: Sequence[str]) -> None:
    """Raises ConfigError if a given folder is missing."""
    missing = [path for path in paths if path != "runs" and not Path(path).exists()]
    if missing:
        raise ConfigError(f"{missing[0]}: no such folder; give one that holds runs (default: runs)")


def compare_command(args: argparse.Namespace) -> int:
    from lra.report.compare import compare

    if len(args.paths) > 2:
        raise ConfigError(f"{len(args.paths)} folders; lra compare takes one or two")
    check_folders(args.paths)
    options = {"tasks": args.task, "models": args.model, "protocol": args.protocol}
    print_lines(compare(args.paths, plot=args.plot, **options).rstrip("\n"))
    return 0


def plot_command(args: argparse.Namespace) -> int:
    from lra.report.plots import plot_learning_curves

    print(plot_learning_curves(args.paths, args.output, args.task))
    return 0


def eval_command(args: argparse.Namespace) -> int:
    from lra.report.evaluate import evaluate_run

    print_lines(evaluate_run(args.folder, overrides=args.overrides, **saved_run_options(args)))
    return 0


def check_command(args: argparse.Namespace) -> int:
    from lra.report.check import check_records

    if args.rescore is not None and args.rescore < 0:
        raise ConfigError(f"--rescore {args.rescore}: expected 0 or more")
    options = {"rescore": args.rescore, "allow_targets": args.allow_target}
    verdicts = []
    for verdict in check_records(args.paths, args.data_root, **options):
        print_lines(str(verdict).replace("\n", " "))
        verdicts.append(verdict)
    if failed := sum(bool(verdict.failed) for verdict in verdicts):
        raise MismatchError(f"{failed} of {len(verdicts)} records failed")
    print(f"{len(verdicts)} records, none failed")
    return 0


def diagnose_command(args: argparse.Namespace) -> int:
    from lra.report.diagnose import diagnose

    try:
        sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else None
    except ValueError:
        raise ConfigError(
            f"--sizes {args.sizes}: expected whole numbers such as 1,16,256"
        ) from None
    options = {**saved_run_options(args), "examples": args.examples}
    tables: dict = {}
    for name, found, text in diagnose(args.folder, args.overrides, sizes=sizes, **options):
        print_lines(text + "\n")
        tables |= {f"{name}: {heading}": rows for heading, rows in found.items()}
    if args.plot:
        from lra.report.plots import plot_diagnostics

        print(plot_diagnostics(tables, args.plot))
    return 0


def saved_run_options(args: argparse.Namespace) -> dict:
    """The options of `add_saved_run`, as arguments of `lra.report.saved_run.SavedRun`."""
    return {"split": args.split, "weights": args.weights, "allow_targets": args.allow_target}


def print_lines(text: str) -> None:
    """Prints text with names of a record, whose control characters are escaped."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


def list_options(args: argparse.Namespace) -> int:
    """Prints each name with the first sentence of the comment at the top of its YAML file."""
    for file in sorted((CONF / args.group).glob("*.yaml")):
        head = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
        about = " ".join(line.removeprefix("#").strip() for line in head)
        about = about.removeprefix(f"conf/{args.group}/{file.name} -- ")
        sentence = re.split(r"(?<=\.) (?!\d)", about)[0]  # not split at "Tay et al. 2020"
        print(f"{file.stem:<19} {sentence}")
    return 0


def keys_command(args: argparse.Namespace) -> int:
    from lra.config.keys import describe_keys

    print(describe_keys(args.prefixes), end="")
    return 0


def models_command(args: argparse.Namespace) -> int:
    if not args.overrides:
        return list_options(args)
    from lra.report.models import cost_table

    print(cost_table(args.overrides, args.format), end="")
    return 0


def experiments_command(args: argparse.Namespace) -> int:
    from lra.report.experiments import experiments_table

    print(experiments_table(args.tasks, args.runs, args.format), end="")
    return 0


def composed(args: argparse.Namespace) -> Iterator[tuple]:
    """Yields (config, task) of each named task."""
    from lra.config.build import build_task
    from lra.config.compose import compose

    flags = ("download", "allow_partial")
    switches = [f"data.{flag}=true" for flag in flags if getattr(args, flag, False)]
    words = [word.removeprefix("task=") for word in args.overrides]
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if not names:
        raise ConfigError(f"no task given; write lra data ACTION TASK {' '.join(overrides)}")
    for name in names:
        cfg = compose([f"task={name}", *switches, *overrides, *args.set])
        yield cfg, build_task(cfg)


def prepared(args: argparse.Namespace, **changes) -> Iterator[tuple]:
    """Yields (config, task, store) of each named task; prepares its data if missing.

    `changes` are other arguments of `lra.data.store.prepare` than those of the config.
    """
    for cfg, task in composed(args):
        yield cfg, task, prepared_store(cfg, task, **changes)


def prepared_store(cfg, task, **changes):
    from lra.config.build import data_arguments
    from lra.data.store import prepare
    from lra.runs.progress import preparing

    return preparing(task, partial(prepare, task, **data_arguments(cfg) | changes))


def data_prepare(args: argparse.Namespace) -> int:
    from lra.tasks.base import Task

    for _, task in composed(args) if args.export else ():
        if type(task).export is Task.export:  # the task has no file format
            task.export({}, args.export)  # raises before the preparation
    for cfg, task, store in prepared(args):
        root, what = Path(cfg.data.root), f"{task.name}, protocol {cfg.protocol.name}"
        counts = ", ".join(f"{name} {len(split):,}" for name, split in store.splits.items())
        partial_data = ", PARTIAL" if store.manifest["partial"] else ""
        print(f"{what}: {store.manifest['source']}{partial_data}, {counts}, in {store.path}")
        for note in store.manifest["notes"]:
            print(printable(f"  note: {note}"))
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


def data_verify(args: argparse.Namespace) -> int:
    from lra.data.inspect import verify_lines

    code = 0
    for _, task, store in prepared(args, verify="never"):  # verify_lines lists what is wrong
        for line, problem in verify_lines(task, store):
            print(printable(line))
            code = 3 if problem else code
    return code


def data_info(args: argparse.Namespace) -> int:
    from lra.data.inspect import info_lines

    for cfg, task in composed(args):
        print("\n".join(map(printable, info_lines(task, cfg.protocol.name, Path(cfg.data.root)))))
    return 0


def data_show(args: argparse.Namespace) -> int:
    from lra.data.inspect import generated_rows, show_lines, write_sheet

    if args.n < 1:
        raise ConfigError(f"-n {args.n}: expected 1 or more")
    for cfg, task in composed(args):
        root = Path(cfg.data.root)
        split = generated_rows(task, args.split, args.n, root)
        if split is None:
            split = prepared_store(cfg, task).splits[args.split]
        print("\n".join(show_lines(task, args.split, split, args.n)))
        if task.picture_shape:
            file = args.png or root / "shown" / f"{task.name}.png"
            with disk_errors(file, "--png"):
                print(f"{task.name}: as a picture in {write_sheet(task, split, args.n, file)}")
    return 0


def bench_command(args: argparse.Namespace) -> int:
    from lra.bench import measurement

    if args.suite == "data":  # measured without JAX
        from lra.bench import data

        measurements = data.measure(args.data_root)
    else:
        from lra.bench import ops, trainer

        measurements = ops.measure() if args.suite == "ops" else trainer.measure(args.overrides)
    result = measurement.make_result(args.suite, measurements)
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
    result = run(args.overrides, file, fresh=args.fresh)
    print(render(make_table(result)), end="")
    print(f"saved in {file}, with .md, .tex and, over lengths, .png beside it")
    return 0


def suite_command(args: argparse.Namespace) -> int:
    from lra.report.formats import render
    from lra.studies import suite as suites

    if args.action == "list":
        print("\n".join(suites.list_suites()))
        return 0
    if args.name is None:
        raise ConfigError(f"lra suite {args.action} needs a name; `lra suite list` shows them")
    suite = suites.load_suite(args.name)
    chosen = suites.select(suite, args.name, args.overrides)
    failures = suites.run(suite, chosen) if args.action == "run" else []
    make = suites.status if args.action == "status" else suites.make_suite_table
    print(render(make(suite, chosen), args.format), end="")
    return 1 if failures else 0


def reproduce_command(args: argparse.Namespace) -> int:
    from lra.studies.reproduce import ROOT, list_studies, reproduce

    lines = (
        reproduce(args.names, args.output, quick=args.quick, format=args.format)
        if args.names
        else list_studies(args.output or ROOT)
    )
    for line in lines:
        print(line, flush=True)
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    from lra.report.doctor import report

    print(report(args.data_root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
