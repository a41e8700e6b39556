import shutil

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    from tiny_models import tiny_tokenizer

    return tiny_tokenizer()


def _adapted(kind, tokenizer):
    from holdfast.models.loading.causal import adapt
    from tiny_models import tiny_model

    return adapt(tiny_model(kind), tokenizer)


@pytest.fixture(scope="session")
def qwen3(tokenizer):
    return _adapted("qwen3", tokenizer)


@pytest.fixture(scope="session")
def llama(tokenizer):
    return _adapted("llama", tokenizer)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny model as a directory; not to be changed."""
    from tiny_models import tiny_model, tiny_tokenizer

    directory = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """The same directory, to be changed."""
    return shutil.copytree(saved, tmp_path / "model")
