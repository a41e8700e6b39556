"""Errors of other libraries, turned into our own where they enter, and their chatter.

What a library raises over a damaged file is whatever its reader stumbled on, so that
no list of kinds would be complete.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from holdfast.errors import EnvironmentProblem, HoldfastError
from holdfast.models.batching import is_out_of_memory

LONGEST = 300


@contextmanager
def library_errors(
    kind: type[HoldfastError], expected: str, next_step: str
) -> Iterator[None]:
    """Turn whatever a library raises into one error that says what to do.

    Raises:
        HoldfastError: One of that kind; an own error passes as it is.
        EnvironmentProblem: If memory ran out.
    """
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise EnvironmentProblem(
                f"memory for {expected}",
                "that memory ran out",
                "Use a 16-bit --dtype, a smaller model or a larger machine.",
            ) from error
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
        raise kind(expected, said, next_step) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the progress bars and the reports of transformers off the terminal."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
