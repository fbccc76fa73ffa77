"""Code blocks and `lra` commands of the documentation."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("scripts/*.sh"))
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
# Shortens a documented ListOps run to seconds; the run keeps its task, its model and its options.
SIZES = "task.sizes={train: 64, val: 24, test: 21}"
SMALL = [SIZES, "task.min_length=21", "task.max_length=30", "debug=tiny"]


class Command(NamedTuple):
    page: str
    line: str  # without environment variables, comment, redirection and `&`

    @property
    def words(self) -> list[str]:
        """The arguments of `lra`; of several seeds only the first."""
        return [re.sub(r"^(seed=\d+),.*", r"\1", word) for word in shlex.split(self.line)[1:]]

    @property
    def verb(self) -> str:
        """The subcommand; `data`, `bench` and a sweep have two words."""
        first, *rest = self.words
        if first in ("data", "bench") or "-m" in rest:
            return " ".join([first, *rest[:1]])
        return first


def blocks(page: str, *languages: str) -> list[str]:
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return re.findall(pattern, (ROOT / page).read_text("utf-8"), flags=re.M | re.S)


def commands(page: str) -> list[Command]:
    """Every `lra` command of a script, or of a page's bash and sh blocks, in order."""
    script = page.endswith(".sh")
    text = (ROOT / page).read_text("utf-8") if script else "".join(blocks(page, "bash", "sh"))
    text = text.replace("\\\n", " ").replace("$experiment", "stu")
    lines = re.findall(r"^(?:.*?[ /])?(lra (?!\.).*?)(?: &| +#.*| > \S+)?$", text, flags=re.M)
    return [Command(page, line.strip()) for line in lines]


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [list(run) for run in BasicSweeper.split_arguments(parsed, None)[0]]
