"""Every verb's help: flags stand in groups with names, and an example can be run."""

import re
import shlex
from collections.abc import Iterator

import pytest
from cyclopts import App

from holdfast.cli.verbs import app
from holdfast.flags import GROUPS


def verbs_of(found: App, *above: str) -> Iterator[tuple[str, ...]]:
    """The words of every verb."""
    for name in found:
        below = found[name]
        if name.startswith("-") or below is found:
            continue
        if below.default_command is not None:
            yield (*above, name)
        yield from verbs_of(below, *above, name)


VERBS = sorted(verbs_of(app))


def test_every_verb_is_found():
    assert len(VERBS) == 29
    assert {("judge", "rerun"), ("probe-transfer",), ("guard", "fit")} <= {*VERBS}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_flag_stands_in_a_group_with_a_name(verb):
    found = app
    for word in verb:
        found = found[word]
    for argument in found.assemble_argument_collection(parse_docstring=True):
        if not argument.parse or argument.children:
            continue  # Settings are no flag; their fields are.
        names = [group.name for group in argument.parameter.group]
        assert len(names) == 1, argument.name
        assert names[0] in {*GROUPS, "Arguments"}, argument.name
        is_flag = argument.name.startswith("-")
        assert is_flag == (names[0] != "Arguments"), argument.name
        assert argument.parameter.help, argument.name


def example_of(*verb: str) -> list[str]:
    """The words of a verb's example, without the program's name."""
    found = app
    for word in verb:
        found = found[word]
    words = " ".join(found.help.split())
    [example] = re.findall(r"For example, `(holdfast [^`]+)`\.", words)
    assert words.count("For example") == 1
    return shlex.split(example)[1:]


def test_an_example_names_a_study_that_another_example_writes():
    whole = ["organism:cliff", "-o", "studies/cliff"]  # --limit gives no verdict.
    assert example_of("audit") == ["audit", *whole]
    assert example_of("rollout") == ["rollout", *whole]
    suites = example_of("evaluate")[-1]
    assert example_of("evaluate")[-2] == "-o"
    assert example_of("judge", "rerun")[2] == example_of("export")[1] == suites


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_the_help_of_a_verb_has_one_example_and_it_parses(verb):
    given = example_of(*verb)
    assert given[: len(verb)] == list(verb)
    _, bound, _ = app.parse_args(given, exit_on_error=False, print_error=False)
    assert bound.arguments or verb == ("organism", "list")
