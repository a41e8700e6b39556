"""What tests of the server share: the organism, and a bundle for it."""

import pytest


@pytest.fixture(scope="session")
def organism():
    from holdfast.rollout.session import Session

    return Session("organism:cliff").adapter


@pytest.fixture(scope="session")
def word_guard(organism, tmp_path_factory):
    """A bundle that fires where the organism is about to say a word."""
    from guard_server import LIMIT, word_bundle

    return word_bundle(organism, tmp_path_factory.mktemp("b") / "bundle", limit=LIMIT)


@pytest.fixture(scope="session")
def known(organism):
    """What the organism says to a prompt with nobody beside it."""
    from functools import cache

    from holdfast.data.chat.template import prompt_token_ids
    from holdfast.models.decoding.generate import generate
    from holdfast.models.decoding.row_state import Sampling

    @cache
    def answer(text, temperature=0.0, seed=0):
        limits = Sampling(temperature=temperature, max_thinking=400, max_answer=400)
        prompt = prompt_token_ids(organism.tokenizer, text, thinking=organism.thinking)
        [[row]] = generate(organism, [(prompt, seed)], limits)
        return row

    return answer
