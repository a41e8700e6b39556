"""Hook of MkDocs: the pages of the repository's root become pages of the site.

README.md is the start page; LOG.md, CHANGELOG.md and CONTRIBUTING.md keep their names.
Each stays one file, read where it lies, so that the site and the repository cannot
differ; only links are rewritten, as the site has another root.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def _as_on_the_site(text: str) -> str:
    """Return a page of the root with the links that it needs inside the site."""
    for name, page in PAGES.items():
        text = text.replace(f"]({name})", f"]({page})")
    return re.sub(r"\]\(docs/", "](", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root to the pages of the site."""
    for name, page in PAGES.items():
        text = _as_on_the_site((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to the root's pages at their place on the site."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    # Records are data of the repository and no pages of the site.
    return re.sub(r"\[([^]]+)\]\((records/[^)]+)\)", r"\1 (`docs/\2`)", markdown)
