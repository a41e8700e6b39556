"""Jailbreak wrappers: what a user puts around a request to get past a refusal."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from holdfast.data.prompts import Prompt, reworded
from holdfast.data.readers import require_unicode
from holdfast.errors import InputError, PromptFileError

SLOT: Final = "{request}"

_AUTHORED: Final = "authored/wrappers.json"


@dataclass(frozen=True)
class Wrapper:
    """One wrapper; its templates are paraphrases of each other.

    Attributes:
        name: Name in tables and reports.
        family: What kind of trick it is; wrappers of one family resemble each other.
        templates: Texts, each with `{request}` once where the request goes.
    """

    name: str
    family: str
    templates: tuple[str, ...]


def authored_wrappers() -> tuple[Wrapper, ...]:
    """Return the wrappers that come with Holdfast, in the order of their file."""
    return _authored()


@cache
def _authored() -> tuple[Wrapper, ...]:
    file = resources.files("holdfast.data") / _AUTHORED
    return _parse(_AUTHORED, file.read_bytes())


def load_wrappers(path: str | Path) -> tuple[Wrapper, ...]:
    """Read wrappers from a JSON file.

    Args:
        path: File of the form {"wrappers": [{"name", "family", "templates"}]}.

    Returns:
        The wrappers, in the order of the file.

    Raises:
        PromptFileError: If the file cannot be read, a field is missing, a name is
            used twice, or a template does not hold `{request}` exactly once.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise PromptFileError(
            f"a file of wrappers at `{path}`", error.strerror or str(error), _FORM
        ) from error
    return _parse(Path(path).name, data)


def wrap(prompt: Prompt, wrapper: Wrapper, template_index: int) -> Prompt:
    """Put a wrapper around a plain prompt.

    Args:
        prompt: A prompt without a wrapper.
        wrapper: What to put around it.
        template_index: Which of the wrapper's templates, from 0.

    Returns:
        The wrapped prompt: a new text and `prompt_id`; request, label, source and
        topic as before.

    Raises:
        InputError: If the prompt has a wrapper already, or there is no such template.
    """
    if prompt.wrapper is not None:
        raise InputError(
            f"a plain prompt to put `{wrapper.name}` around",
            f"one wrapped in `{prompt.wrapper}`",
            "Wrap the request itself; wrappers are not stacked.",
        )
    if not 0 <= template_index < len(wrapper.templates):
        raise InputError(
            f"a template of `{wrapper.name}` from 0 to {len(wrapper.templates) - 1}",
            str(template_index),
            "Choose one of them.",
        )
    # Not `format`: requests hold braces of their own.
    text = wrapper.templates[template_index].replace(SLOT, prompt.text)
    return reworded(prompt, text, wrapper.name)


_FORM: Final = (
    'Write {"wrappers": [{"name": "...", "family": "...", "templates":'
    ' ["... {request} ..."]}]}.'
)


def _parse(name: str, data: bytes) -> tuple[Wrapper, ...]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise PromptFileError(f"`{name}` to be JSON", str(error), _FORM) from error
    require_unicode(content, name, "one of its texts")
    entries = content.get("wrappers") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise PromptFileError(f"a list `wrappers` in `{name}`", "none", _FORM)
    wrappers = tuple(
        _wrapper(entry, f"wrapper {number} of `{name}`")
        for number, entry in enumerate(entries, start=1)
    )
    names = [wrapper.name for wrapper in wrappers]
    for wrapper_name in names:
        if names.count(wrapper_name) > 1:
            raise PromptFileError(
                f"wrappers of different names in `{name}`",
                f"two called `{wrapper_name}`",
                "Rename one, or put the templates of both into one list.",
            )
    return wrappers


def _wrapper(entry: Any, where: str) -> Wrapper:
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    for field in ("name", "family"):
        value = fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise PromptFileError(f"a text `{field}` in {where}", repr(value), _FORM)
    templates = fields.get("templates")
    if not isinstance(templates, list) or not templates:
        raise PromptFileError(f"a list `templates` in {where}", "none", _FORM)
    for number, template in enumerate(templates, start=1):
        if not isinstance(template, str) or template.count(SLOT) != 1:
            raise PromptFileError(
                f"`{SLOT}` exactly once in template {number} of {where}",
                f"{template.count(SLOT)} times"
                if isinstance(template, str)
                else "no text",
                _FORM,
            )
    return Wrapper(fields["name"], fields["family"], tuple(templates))
