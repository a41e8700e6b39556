"""The text of each token, for display: nothing of a sequence is lost or doubled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from holdfast.data.chat.conversation import token_texts


@pytest.fixture(scope="module")
def octets() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=20))
def test_the_texts_of_tokens_join_to_the_whole(octets, text):
    token_ids = ids(octets, text)
    parts = token_texts(octets, token_ids)
    assert len(parts) == len(token_ids)
    assert "".join(parts) == text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tokens_that_make_no_text_join_to_the_whole_too(octets, data):
    token_ids = data.draw(st.lists(st.integers(0, len(octets) - 1), max_size=12))
    assert "".join(token_texts(octets, token_ids)) == octets.decode(token_ids)


def test_a_character_of_several_tokens_is_shown_with_its_last(octets):
    parts = token_texts(octets, ids(octets, "a🦑b"))
    assert parts == ("a", "", "", "", "🦑", "b")
