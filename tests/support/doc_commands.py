"""Commands of the documentation, shortened to run in seconds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what makes a documented run one of seconds; it keeps its task, its model and its own words
SIZES = "task.sizes={train: 64, val: 24, test: 21}"
SMALL = [SIZES, "task.min_length=21", "task.max_length=30", "debug=tiny"]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), flags=re.M | re.S)


def commands(path):
    lines = [
        line.split(" #")[0].strip() for block in blocks(path, "bash") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("lra ")]


def run(words, cwd, timeout=300, **variables):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "lra.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env
    )


def shortened(command, data_root):
    """The words of a documented command, made short by overrides at its end."""
    words = shlex.split(command)[1:]
    small = [*(SMALL if "listops" in command else [SIZES, "debug=tiny"]), f"data.root={data_root}"]
    if words[0] == "train" and "--cfg" not in words:
        return [*words, *small, "trainer.steps=2", "trainer.distributed_timeout=120"]
    if words[0] == "data":
        return [*words, *([] if "--set" in words else ["--set"]), *small]
    return words
