"""Reads the YAML files of `--config-dir` and `hydra.searchpath`; errors name file, line and column.

Hydra has no setting for how files are read, so `use_checked_files` replaces a method. A class in
its registry would be refused by the workers of `hydra/launcher=joblib`.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf.errors import OmegaConfBaseException

from lra.errors import ConfigError

MAX_VALUES = 100_000  # of one file, with the values that aliases repeat
read_file = FileConfigSource.load_config  # Hydra's own, before `use_checked_files`


def read_checked_file(source: Any, config_path: str) -> ConfigResult:
    """Reads a file as Hydra does, with a ConfigError of one line for one that cannot be read."""
    file = Path(source.path) / source._normalize_file_name(config_path)
    try:
        check_nodes(file)
        return read_file(source, config_path)
    except ConfigLoadError:  # no such file
        raise
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(filter(None, (error.problem, error.context)))
        raise ConfigError(f"{file}{place}: {reason}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None


def use_checked_files() -> None:
    """Makes Hydra read files through `read_checked_file`; may be called again."""
    Plugins.instance()  # registers Hydra's classes, of which it may import copies
    SourcesRegistry.instance().types["file"].load_config = read_checked_file  # type: ignore


def check_nodes(file: Path) -> None:
    """Checks that a file holds a mapping, and that its aliases do not repeat values without end.

    Raises:
        ConfigError: another type, or more than `MAX_VALUES` values.
        yaml.YAMLError: a syntax error.
    """
    if not file.is_file():
        return
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode | None):
        raise ConfigError(f"{file}: expected a mapping, lines such as KEY: VALUE")
    if root is not None and count_values(root, {}) > MAX_VALUES:
        raise ConfigError(f"{file}: its aliases repeat values more than {MAX_VALUES:,} times")


def count_values(node: yaml.Node, counts: dict[int, int | float]) -> int | float:
    """Returns the number of nodes after the expansion of aliases; inf if one contains itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # until all its children are counted
        counts[id(node)] = 1 + sum(count_values(child, counts) for child in children(node))
    return counts[id(node)]


def children(node: yaml.Node) -> Iterator[yaml.Node]:
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from item if isinstance(item, tuple) else (item,)
