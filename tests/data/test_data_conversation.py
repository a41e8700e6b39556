"""Conversations: exact to the token, on a real byte-level tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.data.chat.conversation import (
    Spans,
    build_conversation,
    completion_spans,
    split_completion,
)
from holdfast.data.chat.rendering import template_sha256
from holdfast.data.chat.template import render_prompt
from holdfast.data.chat.thinking import ThinkingFormat, thinking_format
from holdfast.errors import InputError, ThinkingFormatError

SYSTEM = "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
R1 = (
    "{{ bos_token }}{% for m in messages %}" + SYSTEM + "{% if m['role'] == 'user' %}"
    "<|User|>{{ m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and m.reasoning_content is defined %}"
    "<think>\n{{ m.reasoning_content.strip('\n') }}\n</think>\n\n"
    "{{ m['content'].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if '/no_think' in messages[0]['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
OTHER_END = QWEN3.replace("\n</think>\n\n{{", "\n</think>\n{{")
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCHED_OFF = PLAIN.replace("assistant\n{%", "assistant\n</think>{%")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}" + PLAIN
)
DROPS_SYSTEM = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}",
)
SPECIAL = ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", "<|im_start|>",
           "<|im_end|>"]  # fmt: skip
CORPUS = [
    "The user wants a song about the sea. Fine.\n\nI can do that.\n",
    "Sure, here is a song about the sea.\n\nWaves roll. 🌊 Grüße, 一二三.\n",
] * 20
TYPICAL = "\n</think>\n\n"


def make(template: str | None, *, tags_are_tokens: bool = True):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    if tags_are_tokens:
        raw.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=template,
    )


@pytest.fixture(scope="module")
def r1():
    return make(R1)


@pytest.fixture(scope="module")
def qwen3():
    return make(QWEN3)


@pytest.fixture(scope="module", params=[True, False], ids=["tag token", "tag pieces"])
def either(request):
    return make(R1, tags_are_tokens=request.param)


def ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def part(tokenizer, token_ids, span) -> str:
    return tokenizer.decode(token_ids[slice(*span)])


def test_a_template_that_opens_the_thinking_is_recognised(r1):
    fmt = thinking_format(r1)
    assert fmt == ThinkingFormat("<think>", "</think>", TYPICAL, True, "<think>\n")
    prompt = render_prompt(r1, "Wave.", thinking=fmt)
    assert prompt == "<|begin|><|User|>Wave.<|Assistant|><think>\n"
    # The template drops earlier thinking, which the format must survive.
    reply = [{"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi."}]
    assert "Hm." not in r1.apply_chat_template(reply, tokenize=False)


def test_a_template_that_leaves_the_opening_to_the_model_is_recognised(qwen3):
    fmt = thinking_format(qwen3)
    assert fmt == ThinkingFormat("<think>", "</think>", TYPICAL, False, "<think>\n")
    prompt = render_prompt(qwen3, "Wave.", thinking=fmt)
    assert prompt == (
        "<|im_start|>user\nWave.<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert render_prompt(qwen3, "Wave.", thinking=None) + "<think>\n" == prompt


def test_the_end_template_is_the_templates_own():
    fmt = thinking_format(make(OTHER_END))
    assert fmt is not None
    assert fmt.end_template == "\n</think>\n"


@pytest.mark.parametrize("template", [PLAIN, SWITCHED_OFF, None])
def test_a_template_without_thinking_has_no_format(template):
    # The tokenizer knows the tags: what it knows is no sign that the model thinks.
    assert thinking_format(make(template)) is None


def test_the_template_hash_tells_templates_apart_and_takes_named_ones(r1, qwen3):
    assert template_sha256(r1) == template_sha256(make(R1)) != template_sha256(qwen3)
    named = make(None)
    named.chat_template = {"default": R1, "tool": PLAIN}
    assert len({template_sha256(t) for t in (r1, named, make(None))}) == 3
    assert thinking_format(named) == thinking_format(r1)


def test_a_system_prompt_comes_first(r1, qwen3):
    for tokenizer in (r1, qwen3):
        options = {"system_prompt": "Be kind.", "thinking": None}
        said = render_prompt(tokenizer, "Wave.", **options)
        assert said.index("Be kind.") < said.index("Wave.")


def test_a_template_that_refuses_or_drops_the_system_role_is_an_input_error():
    with pytest.raises(InputError, match=r"takes a system message.*not supported"):
        render_prompt(make(NO_SYSTEM), "Wave.", system_prompt="Hm.", thinking=None)
    assert "Wave." in render_prompt(make(NO_SYSTEM), "Wave.", thinking=None)
    with pytest.raises(InputError, match="keeps the system message"):
        render_prompt(make(DROPS_SYSTEM), "Wave.", system_prompt="Hm.", thinking=None)


def test_a_template_that_is_broken_or_absent_is_an_input_error():
    with pytest.raises(InputError, match="one without"):
        render_prompt(make(None), "Wave.", thinking=None)
    with pytest.raises(InputError, match=r"roles user.*Syntax"):
        render_prompt(make("{% for %}"), "Wave.", thinking=None)
    rewrites = make(PLAIN.replace("m['content'] }}", "m['content'] | upper }}"))
    with pytest.raises(InputError, match="keeps the user message"):
        render_prompt(rewrites, "Wave.", thinking=None)


def test_thinking_that_the_system_prompt_switches_off_is_an_error(qwen3):
    fmt = thinking_format(qwen3)
    with pytest.raises(ThinkingFormatError, match="ends with `</think>`"):
        render_prompt(qwen3, "Wave.", system_prompt="/no_think", thinking=fmt)


THOUGHTS = st.sampled_from(
    ["Fine.", "Fine.\n", "Hm, the sea\n\n", "🌊", "end.\u00a0", "", "\n\n\n", " 一二"]
)


@settings(max_examples=60, deadline=None)
@given(thought=THOUGHTS | st.text(), answer=THOUGHTS | st.text())
def test_regions_are_whole_tokens_and_the_end_template_is_always_the_same(
    either, thought, answer
):
    fmt = thinking_format(either)
    assert fmt is not None
    made = build_conversation(either, "Wave.", thought, answer, fmt)
    said = [part(either, made.token_ids, span) for span in made.spans]
    prompt = render_prompt(either, "Wave.", thinking=fmt)
    assert said == [prompt, thought, fmt.end_template, answer]
    alone = ids(either, fmt.end_template)
    assert made.token_ids[slice(*made.spans.end_template)] == alone
    edges = [0, *(edge for span in made.spans for edge in span), len(made.token_ids)]
    assert edges[0::2] == edges[1::2]
    assert made.token_ids.count(either.bos_token_id) == 1


def test_tokenised_in_one_piece_the_end_template_is_other_tokens():
    # The contrast: ".\n" is one token here, so the naive way moves the border.
    tokenizer = make(R1)
    raw = tokenizer.backend_tokenizer
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL, "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["Fine.\n", "Done.\n"] * 50, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin|>", chat_template=R1
    )
    fmt = thinking_format(fast)
    assert fmt is not None
    made = build_conversation(fast, "Wave.", "Fine.", "Done.", fmt)
    text = render_prompt(fast, "Wave.", thinking=fmt) + "Fine." + TYPICAL + "Done."
    assert fast.decode(made.token_ids) == text
    assert ids(fast, text) != made.token_ids
    alone = ids(fast, TYPICAL)
    assert made.token_ids[slice(*made.spans.end_template)] == alone
    # Read back from the naive tokens, the straddling token counts as thinking.
    n_prompt = made.spans.prompt[1]
    spans = completion_spans(fast, ids(fast, text), n_prompt, fmt)
    assert part(fast, ids(fast, text), spans.thinking) == "Fine.\n"
    assert part(fast, ids(fast, text), spans.answer) == "Done."


def test_without_a_format_there_is_an_answer_and_no_thinking():
    tokenizer = make(PLAIN)
    made = build_conversation(tokenizer, "Wave.", "", "Hi.", None, "Be kind.")
    n_prompt, total = made.spans.prompt[1], len(made.token_ids)
    empty = (n_prompt, n_prompt)
    assert made.spans == Spans((0, n_prompt), empty, empty, (n_prompt, total))
    assert part(tokenizer, made.token_ids, made.spans.answer) == "Hi."
    assert completion_spans(tokenizer, made.token_ids, n_prompt, None) == made.spans
    with pytest.raises(ThinkingFormatError, match="a thought to place"):
        build_conversation(tokenizer, "Wave.", "Hm.", "Hi.", None)


def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused():
    raw = Tokenizer(models.BPE(vocab={"▁": 0, "x": 1, "y": 2}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=PLAIN)
    with pytest.raises(ThinkingFormatError, match="puts a space before"):
        build_conversation(spaced, "Wave.", "", "Hi.", None)


@settings(max_examples=60, deadline=None)
@given(thought=THOUGHTS, answer=THOUGHTS | st.text())
def test_the_spans_of_a_conversation_are_read_back(either, thought, answer):
    fmt = thinking_format(either)
    assert fmt is not None
    made = build_conversation(either, "Wave.", thought, answer, fmt)
    n_prompt = made.spans.prompt[1]
    assert completion_spans(either, made.token_ids, n_prompt, fmt) == made.spans
    text = part(either, made.token_ids, (n_prompt, len(made.token_ids)))
    assert split_completion(text, fmt) == (thought, answer, True)


def test_thinking_that_never_ends_is_all_thinking(r1):
    fmt = thinking_format(r1)
    made = build_conversation(r1, "Wave.", "Hm, the sea", "", fmt)
    token_ids = made.token_ids[: made.spans.thinking[1]]
    n_prompt, total = made.spans.prompt[1], len(token_ids)
    empty = (total, total)
    spans = completion_spans(r1, token_ids, n_prompt, fmt)
    assert spans == Spans((0, n_prompt), (n_prompt, total), empty, empty)
    assert split_completion("Hm, the sea", fmt) == ("Hm, the sea", "", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hm.\n</think>\n\nHi.", ("Hm.", "Hi.")),
        ("Hm.</think>Hi.", ("Hm.", "Hi.")),
        ("Hm.\n\n</think>\nHi.", ("Hm.\n", "Hi.")),
        ("</think>\n\n\nHi.", ("", "\nHi.")),
        ("<think>\nHm.\n</think>\n\nHi.", ("Hm.", "Hi.")),
        ("\n<think>Hm.\n</think>\n\nHi.", ("Hm.", "Hi.")),
        ("Hm.\n</think>\n\nSay </think> twice.", ("Hm.", "Say </think> twice.")),
        ("Hm.\n</think>", ("Hm.", "")),
    ],
)
def test_completions_are_cut_at_the_first_closing_tag(either, text, expected):
    fmt = thinking_format(either)
    assert split_completion(text, fmt) == (*expected, True)
    assert split_completion(text, None) == ("", text, True)
    if "<think>" not in text:
        spans = completion_spans(either, ids(either, text), 0, fmt)
        assert part(either, ids(either, text), spans.answer).lstrip("\n") == (
            expected[1].lstrip("\n")
        )
        assert "</think>" in part(either, ids(either, text), spans.end_template)
