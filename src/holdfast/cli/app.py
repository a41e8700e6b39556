"""The command line: verbs to stages, flags to settings, errors to exit statuses.

No tensor library is imported before a verb runs, so that help is there at once.
"""

import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Toml
from rich.console import Console
from rich.markup import escape

from holdfast.cli.verbs import app
from holdfast.errors import HoldfastError, InputError

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # Libraries that ask none of the above draw bars of their own.
    "TQDM_DISABLE": "1",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, by default that of the process; leave with its exit status."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


INTERRUPTED = 130
BAD_COMMAND = 2
root = App(
    name="holdfast",
    help_flags=(),
    version_flags=(),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


@root.default
def _launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> int:
    """Run a command with the defaults of a TOML file."""
    app.config = ()
    if config is not None:
        _check_config(config)
        # A table per verb: `[audit]`, with the flags as keys.
        app.config = (Toml(config, must_exist=True),)
    found = app(list(words), exit_on_error=False, print_error=False)
    return found if isinstance(found, int) else 0


def run(words: Sequence[str]) -> int:
    """Run a command and return its exit status.

    Returns: 0, 1 when `--fail-if` applies, or the status of the error's kind.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        found = root(list(words), exit_on_error=False, print_error=False)
    except HoldfastError as error:
        _complain(errors, str(error))
        return error.exit_status
    except CycloptsError as error:
        verb = " ".join(("holdfast", *(error.command_chain or ())))
        _complain(errors, f"{error} Try `{verb} --help`.")
        return BAD_COMMAND
    except KeyboardInterrupt:
        kept = "interrupted; what was computed is kept. Run the same command again to"
        _complain(errors, f"{kept} continue.")
        return INTERRUPTED
    return found if isinstance(found, int) else 0


def _complain(errors: Console, message: str) -> None:
    errors.print(f"[bold red]holdfast:[/] {escape(message)}")


def _check_config(path: Path) -> None:
    """Refuse a configuration file that is missing or no TOML."""
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"a configuration file at `{path}`",
            error.strerror or str(error),
            "Check the path.",
        ) from error
    except ValueError as error:
        raise InputError(
            f"TOML in `{path}`",
            f"a fault ({error})",
            "Write a table per verb, for example [audit], with the flags as keys.",
        ) from error
