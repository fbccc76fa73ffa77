"""Rules accept the valid values and refuse the others with one line that names the key."""

import pytest

from lra.config.rules import (
    DURATION,
    OPTIONAL_PATTERN,
    ParameterGroups,
    choice,
    count,
    format_value,
    number,
    parse_duration,
)
from lra.errors import ConfigError

GROUP = {"match": "m_u", "lr_factor": 1, "weight_decay": 0}


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (-0.1, 1)),
        ("(0, 1]", (0.1, 1), (0, 1.1)),
        ("(0, inf)", (1e-9, 1e30), (0, float("inf"))),
    ],
)
def test_number_respects_the_ends_of_its_interval(interval, inside, outside):
    for value in inside:
        number(interval).check("key", value)
    for value in (*outside, float("nan"), "1", None, True, [1]):
        with pytest.raises(ConfigError, match="key="):
            number(interval).check("key", value)
    number(interval, None).check("key", None)


def test_count_is_a_whole_number_or_a_word():
    for value in (1, 9, "auto", None):
        count("auto", None).check("key", value)
    for value in (0, 0.5, "automatic", True):
        with pytest.raises(
            ConfigError,
            match=f"key={format_value(value)} must be a whole number of at least 1 or auto or null",
        ):
            count("auto", None).check("key", value)


@pytest.mark.parametrize("value", ["offf", True, None, 3, ["off"]])
def test_choice_names_its_words_but_not_their_other_spellings(value):
    rule = choice("auto", "off", also=[False])
    rule.check("key", False)
    rule.check("key", "off")
    with pytest.raises(ConfigError, match=r"is unknown; choose one of auto, off$"):
        rule.check("key", value)


def test_pattern_error_says_where():
    OPTIONAL_PATTERN.check("key", None)
    OPTIONAL_PATTERN.check("key", "m_y$")
    with pytest.raises(ConfigError, match=r"key=\( must be a regular expression or null: missing"):
        OPTIONAL_PATTERN.check("key", "(")
    for text in ("a{99999999999}", "(" * 5000 + ")" * 5000):  # too large for Python
        with pytest.raises(ConfigError, match="must be a regular expression or null: "):
            OPTIONAL_PATTERN.check("key", text)
    with pytest.raises(ConfigError, match="key=3 must be a regular expression"):
        OPTIONAL_PATTERN.check("key", 3)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (3, "groups=3 must be a mapping"),
        ({"a": {"match": "m_u"}}, "must have exactly match, lr_factor and weight_decay"),
        ({"a": 3}, "groups.a=3 must have exactly match, lr_factor and weight_decay"),
        ({"default": GROUP}, "groups.default has the name of a built-in group"),
        ({"no_decay": GROUP}, "groups.no_decay has the name of a built-in group"),
        ({"a": GROUP | {"match": "("}}, r"groups.a.match=\( must be a regular expression"),
        ({"a": GROUP | {"lr_factor": -1}}, "groups.a.lr_factor=-1 must be a number of at least 0"),
    ],
)
def test_parameter_group_has_exactly_its_members(groups, message):
    ParameterGroups().check("groups", {"a": GROUP})
    ParameterGroups().check("groups", None)
    with pytest.raises(ConfigError, match=message):
        ParameterGroups().check("groups", groups)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90),
        (1.5, 1.5),
        ("90", 90),
        ("3h30m", 12600),
        ("45m", 2700),
        ("10s", 10),
        ("1d12h", 129600),
        ("3:30:00", 12600),
        ("03:30:05", 12605),
        ("1-00:00:00", 86400),
        (None, None),
    ],
)
def test_duration(value, seconds):
    assert parse_duration(value) == seconds
    DURATION.check("key", value)


@pytest.mark.parametrize(
    "value", [0, -1, "", "x", "3h 30m", "30:00", "1:99:00", True, "30m3h", float("inf"), "nan"]
)
def test_anything_else_is_no_duration(value):
    with pytest.raises(ConfigError, match="must be a duration above 0: seconds, 3h30m"):
        DURATION.check("key", value)
