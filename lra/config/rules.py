"""Rules for the values of config keys, with the descriptions that error messages and help print."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lra.errors import ConfigError


def parse_duration(value: object) -> float | None:
    """Seconds of 90, "90", "3h30m", "1d12h", "HH:MM:SS" or SLURM's "D-HH:MM:SS".

    None for None, 0 for anything else.
    """
    if value is None:
        return None
    written = "" if isinstance(value, bool) else str(value).strip()
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", written):
        return float(written)
    units = r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?"
    clock = r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)"
    match = re.fullmatch(units, written) or re.fullmatch(clock, written)
    parts = match.groups() if match else ()
    return float(sum(int(n or 0) * s for n, s in zip(parts, (86400, 3600, 60, 1), strict=False)))


def must_have(names: Sequence[str] | Mapping[str, Any]) -> str:
    *most, last = names
    return f"must have exactly {', '.join(most)} and {last}" if most else f"must have {last}"


def format_value(value: Any) -> str:
    """Formats a value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not (value.strip() and value.isprintable()):
        return repr(value)
    return str(value)


INT32_MAX = 2**31 - 1  # steps and indices are int32 on the devices


@dataclass(frozen=True)
class Rule:
    """Valid values of a key, and their description, which `verb` joins in an error message.

    `accepts` may raise one of the errors below instead of returning False.
    """

    description: str
    accepts: Callable[[Any], bool]
    verb: str = "must be"

    def check(self, key: str, value: Any) -> None:
        """Raises ConfigError if `value` is not valid."""
        reason = ""
        try:
            if self.accepts(value):
                return
        except (ValueError, TypeError, OverflowError, RecursionError, re.error) as error:
            reason = f": {error}"
        expected = self.description
        if value == math.inf:
            expected = expected.replace("number", "finite number", 1)
        raise ConfigError(f"{key}={format_value(value)} {self.verb} {expected}{reason}")


def number(interval: str, *words: str | None, whole: bool = False, most: int = INT32_MAX) -> Rule:
    """Numbers of an interval such as "[0, 1)", or one of `words`; NaN and infinity are invalid.

    Args:
        whole: only whole numbers; without an upper end of the interval, those up to `most`.
    """
    low, high = map(float, interval[1:-1].split(", "))
    kinds = int if whole else (int, float)

    def accepts(value: Any) -> bool:
        if value is None or isinstance(value, str):
            return value in words
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        if whole and high == math.inf and value > most:
            raise ValueError(f"the largest is {most}")
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        return above and below

    bound = f"in {interval}"
    if high == math.inf:
        bound = f"{'of at least' if interval[0] == '[' else 'above'} {low:g}"
    kind = "a whole number" if whole else "a number"
    return Rule(" or ".join([f"{kind} {bound}", *map(format_value, words)]), accepts)


def count(*words: str | None, most: int = INT32_MAX) -> Rule:
    """Whole numbers from 1 to `most`, or one of `words`."""
    return number("[1, inf)", *words, whole=True, most=most)


def choice(*words: str, also: Sequence[Any] = ()) -> Rule:
    """One of `words`; `also` lists other spellings, which the description omits."""
    description = f"one of {', '.join(words)}"
    return Rule(description, lambda value: value in (*words, *also), "is unknown; choose")


def text(description: str, optional: bool = False) -> Rule:
    """Printable text that is not empty."""
    description += " or null" if optional else ""

    def accepts(value: Any) -> bool:
        if not isinstance(value, str):
            return optional and value is None
        return bool(value.strip()) and value.isprintable()

    return Rule(description, accepts)


def described(description: str) -> Rule:
    """A value that its reader checks, such as an argument of a constructor."""
    return Rule(description, lambda value: True)


SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
PATTERN = Rule("a regular expression", lambda value: bool(re.compile(value)))
OPTIONAL_PATTERN = Rule(
    "a regular expression or null", lambda value: value is None or bool(re.compile(value))
)
DURATION = Rule(
    "a duration above 0: seconds, 3h30m, HH:MM:SS, D-HH:MM:SS, or null",
    lambda value: parse_duration(value) != 0,
)
WORDS = Rule(
    "a list of words",
    lambda value: (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(word, str) for word in value)
    ),
)


class ParameterGroups(Rule):
    """The mapping {name: {match, lr_factor, weight_decay}, ...} of `optim.groups`, or null."""

    MEMBERS: Mapping[str, Rule] = {
        "match": PATTERN,
        "lr_factor": number("[0, inf)"),
        "weight_decay": number("[0, inf)"),
    }

    def __init__(self) -> None:
        form = "a mapping, {name: {match, lr_factor, weight_decay}, ...}"
        super().__init__(form, lambda value: value is None or isinstance(value, Mapping))

    def check(self, key: str, value: Any) -> None:
        super().check(key, value)
        for name, group in (value or {}).items():
            path = f"{key}.{name}"
            if name in ("default", "no_decay"):
                raise ConfigError(f"{path} has the name of a built-in group; choose another")
            if not isinstance(group, Mapping) or set(group) != set(self.MEMBERS):
                raise ConfigError(f"{path}={format_value(group)} {must_have(self.MEMBERS)}")
            for member, rule in self.MEMBERS.items():
                rule.check(f"{path}.{member}", group[member])
