"""Prompt files on disk, and what is asserted of reading them."""

from pathlib import Path

import pytest

from holdfast.data.prompts import PromptFile, read_prompts
from holdfast.errors import PromptFileError


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(path: str, **options: str | bool) -> PromptFile:
    return read_prompts(path, label="harmful", **options)


def texts(file: PromptFile) -> list[str]:
    return [prompt.text for prompt in file.prompts]


def fails(path: str, *words: str, **options: str | bool) -> PromptFileError:
    with pytest.raises(PromptFileError) as caught:
        read(path, **options)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_status == 2
    return caught.value
