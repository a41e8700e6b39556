"""Fixtures that every test may use."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny_denoiser
import tiny_thinker

torch.set_num_threads(1)

pytest_plugins = ["model_fixtures"]


@pytest.fixture(scope="session")
def thinker(tmp_path_factory):
    """A model directory that refuses, complies, and has an attack that works."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    tokenizer = tiny_thinker.tokenizer()
    tiny_thinker.teach(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory):
    """A masked-diffusion model directory of the same world."""
    folder = tmp_path_factory.mktemp("models") / "denoiser"
    tokenizer = tiny_denoiser.tokenizer()
    tiny_denoiser.teach(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(thinker, tmp_path_factory):
    """The same weights under a chat template without thinking."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    folder.mkdir()
    for path in thinker.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = tiny_thinker.tokenizer(tiny_thinker.NO_THINKING)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Prompt files of the little world, as flags of the command line."""
    files = tiny_thinker.write_world(tmp_path_factory.mktemp("world"))
    flags = [(f"--{role.replace('_', '-')}", path) for role, path in files.items()]
    return [
        *(word for pair in flags for word in pair),
        *("--max-thinking", "64", "--max-answer", "32"),
    ]


@pytest.fixture(scope="session")
def audited(thinker, world, tmp_path_factory):
    """The study of an undisturbed audit."""
    from holdfast.cli.app import run

    study = tmp_path_factory.mktemp("studies") / "undisturbed"
    assert run(["audit", str(thinker), *world, "-o", str(study)]) == 0
    return study
