"""Names of the config groups and of their options, and the folder that holds them."""

import re
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
# parts of a task's or model's section that the harness reads, not its constructor
NOT_ARGUMENTS = ("hparams", "param_count", "recipe")
OPTIONAL_GROUPS = ("experiment", "size", "debug")
OTHER_COMMANDS = ("bench", "suite")  # folders of other commands than `lra train`


def options(group: str) -> list[str]:
    """Names that `group=` accepts, from the files in conf/."""
    folder = CONF / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def experiment_text(name: str) -> str:
    """The file of an experiment, followed by those it is based on; empty if it is not in conf/."""
    file = CONF / "experiment" / f"{name}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text + "".join(map(experiment_text, re.findall(r"^ *- (\w+/\w+)$", text, re.MULTILINE)))
