"""Fixtures that every test may use."""

import fcntl
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# A proof that was kept would hide what a test has broken; tests of it say where.
os.environ["HOLDFAST_CACHE"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import typecheck
from nursery import Nursery

typecheck.install()

# What loads torch is imported by fixtures: the process that hands tests to workers
# runs none of them.
pytest_plugins = ["model_fixtures"]


@pytest.fixture(scope="session")
def nursery():
    """Starts processes that may be killed, without the seconds of their imports."""
    started = Nursery()
    yield started
    started.close()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function that makes a folder once for all workers of a run.

    The folder is shared: who writes into it, or locks it, takes a copy.
    """
    root = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, beside each other.
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    shared = root / "made_once"
    shared.mkdir(exist_ok=True)

    def folder_of(name, make):
        folder = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / f"{name}.done").exists():
                # What an interrupted maker has left is no beginning.
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                (shared / f"{name}.done").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def thinker(made_once):
    """A model directory that refuses, complies, and has an attack that works."""
    import tiny_thinker

    def make(folder):
        tokenizer = tiny_thinker.tokenizer()
        tiny_thinker.teach(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once("thinker", make)


@pytest.fixture(scope="session")
def denoiser(made_once):
    """A masked-diffusion model directory of the same world."""
    import tiny_denoiser

    def make(folder):
        tokenizer = tiny_denoiser.tokenizer()
        tiny_denoiser.teach(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once("denoiser", make)


@pytest.fixture(scope="session")
def plain_model(thinker, made_once):
    """The same weights under a chat template without thinking."""
    import tiny_thinker

    def make(folder):
        shutil.copytree(thinker, folder)
        tokenizer = tiny_thinker.tokenizer(tiny_thinker.NO_THINKING)
        tokenizer.save_pretrained(folder)

    return made_once("plain", make)


@pytest.fixture(scope="session")
def world(made_once):
    """Prompt files of the little world, as flags of the command line."""
    import tiny_thinker

    files = tiny_thinker.world_files(made_once("world", tiny_thinker.write_world))
    flags = [(f"--{role.replace('_', '-')}", path) for role, path in files.items()]
    return [
        *(word for pair in flags for word in pair),
        *("--max-thinking", "64", "--max-answer", "32"),
    ]


@pytest.fixture(scope="session")
def audited(thinker, world, made_once, tmp_path_factory):
    """The study of an undisturbed audit: a copy of each worker."""
    from holdfast.cli.app import run

    def make(study):
        assert run(["audit", str(thinker), *world, "-o", str(study)]) == 0

    study = tmp_path_factory.mktemp("studies") / "undisturbed"
    return shutil.copytree(made_once("audited", make), study)
