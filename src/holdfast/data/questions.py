"""Questions with exact answers: a suite that has them, or a file of one's own."""

from typing import Final

from holdfast.data.items import SuiteFile
from holdfast.data.sources import load
from holdfast.data.suites import PLAINLY, Suite, items_of, read_suite, suites
from holdfast.errors import PromptFileError, SettingsError

TARGETS: Final = ("target", "answer", "solution")
"""Names of a column of answers, case folded, the first that exists being read."""


def read_questions(source: str) -> SuiteFile:
    """Read questions, each with the number that answers it.

    Args:
        source: A suite with exact answers; NAME=FILE for a file in the shape of such
            a suite; or a file, or hub:owner/name, with a column of prompts and one of
            answers.

    Returns:
        Items of the kind utility, each with its target.

    Raises:
        SettingsError: If the suite has no exact answers.
        PromptFileError: If a file cannot be read, or has no column of answers.
        InputError: If a suite is not the pinned one.
        OfflineError: If the Hub cannot be reached.
    """
    exact = [name for name, suite in suites().items() if suite.target]
    name, equals, _ = source.partition("=")
    if source in suites() or (equals and name in suites()):
        if name not in exact:
            raise SettingsError(
                f"a suite with exact answers: {', '.join(exact)}",
                f"`{name}`",
                "Choose one, or give a file with columns `prompt` and `answer`.",
            )
        return _of_one_turn(read_suite(source), source)
    content = load(source, None)
    columns = {column.strip().casefold() for column in content.table.columns}
    target = next((each for each in TARGETS if each in columns), None)
    if target is None:
        raise PromptFileError(
            f"a column of answers ({', '.join(TARGETS)}) in `{content.name}`",
            ", ".join(f"`{each}`" for each in content.table.columns) or "no columns",
            f"Add one, or name a suite with exact answers: {', '.join(exact)}.",
        )
    own = Suite(
        name=content.name,
        about="questions of your own",
        licence="",
        kind="utility",
        column="",
        files=(),
        hub="",
        sha256=(),
        target=target,
    )
    found = items_of(own, content, PLAINLY, "A file of your own.")
    return _of_one_turn(found, content.name)


def _of_one_turn(file: SuiteFile, name: str) -> SuiteFile:
    longer = sum(bool(item.prompt.earlier) for item in file.items)
    if not longer:
        return file
    raise PromptFileError(
        f"questions of one turn in `{name}`",
        f"{longer} conversations",
        "Leave them out: an exact answer is compared with the first answer.",
    )
