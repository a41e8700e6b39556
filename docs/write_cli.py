"""Write docs/cli.md from the command line itself: `python docs/write_cli.py`."""

import sys
from pathlib import Path
from unittest import mock

from holdfast.cli.verbs import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = "<!-- Written by docs/write_cli.py; change the code and run it again. -->\n\n"


def page() -> str:
    """Return the page as it should be."""
    # The usage lines name the running program, which here is not the command line:
    # `python -m pytest` would be in the page.
    with mock.patch.object(sys, "argv", ["holdfast"]):
        return HEAD + app.generate_docs().rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
