"""Names of the config groups and of their options, and the folder that holds them."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
# parts of a task's or model's section that the harness reads, not its constructor
NOT_ARGUMENTS = ("hparams", "param_count", "recipe")
OPTIONAL_GROUPS = ("experiment", "size", "debug")


def options(group: str) -> list[str]:
    """Names that `group=` accepts, from the files in conf/."""
    folder = CONF / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
