"""Rows driven by hand: the tokens are chosen here, not by a model."""

import re

import pytest

from holdfast.data.chat.thinking import thinking_format
from holdfast.errors import InputError, SettingsError
from holdfast.models.batching import require_room
from holdfast.models.decoding.row_state import (
    Choice,
    GenerationState,
    Sampling,
    StoppingRules,
)
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
STOP = TOKENIZER.eos_token_id
PROMPT = (1, 2, 3)


def _ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def _rules(max_thinking=50, max_answer=20, thinking=True):
    sampling = Sampling(temperature=0, max_thinking=max_thinking, max_answer=max_answer)
    fmt = thinking_format(TOKENIZER) if thinking else None
    return StoppingRules(TOKENIZER, fmt, sampling, frozenset({STOP}))


def _run(tokens, rules):
    row = GenerationState(0, PROMPT, rules)
    for token in tokens:
        row.push(Choice(token, 1.0, 1.0))
        if row.finish:
            break
    return row.complete()


def _regions(completion):
    return [
        TOKENIZER.decode(completion.token_ids[start:end])
        for start, end in completion.spans[1:]
    ]


@pytest.mark.parametrize(
    ("emitted", "regions"),
    [
        ("hm\n</think>\n\nYes", ["hm", "\n</think>\n\n", "Yes"]),
        ("hm</think>\n\nYes", ["hm", "</think>\n\n", "Yes"]),
        ("hm</think>Yes", ["hm", "</think>", "Yes"]),
        ("hm\n\n</think>\nYes", ["hm\n\n", "</think>\n", "Yes"]),
        ("hm</think>\n\n\nYes", ["hm", "</think>\n\n", "\nYes"]),
        ("</think>Yes", ["", "</think>", "Yes"]),
        ("hm</think>a</think>b", ["hm", "</think>", "a</think>b"]),
    ],
)
def test_the_end_template_is_what_the_model_wrote_of_it(emitted, regions):
    completion = _run([*_ids(emitted), STOP], _rules())
    assert _regions(completion) == regions
    assert completion.thinking == regions[0]
    assert completion.answer == regions[2]
    assert completion.finish == "stop"
    assert completion.closed
    assert not completion.forced_close


def test_the_stop_token_is_kept_and_belongs_to_no_region():
    completion = _run([*_ids("a</think>b"), STOP], _rules())
    assert completion.token_ids[-1] == STOP
    assert completion.spans.answer[1] == len(completion.token_ids) - 1


def test_thinking_that_stops_without_closing_has_no_answer():
    completion = _run([*_ids("hm"), STOP], _rules())
    assert _regions(completion) == ["hm", "", ""]
    assert (completion.finish, completion.closed) == ("stop", False)


def test_long_thinking_is_closed_by_force_with_the_whole_template():
    # What is chosen while the template is forced in does not count.
    waste = [65] * len(_ids("\n</think>\n\n"))
    completion = _run([*_ids("abcd"), *waste, *_ids("Yes"), STOP], _rules(4))
    assert _regions(completion) == ["abcd", "\n</think>\n\n", "Yes"]
    assert completion.forced_close
    assert completion.closed
    assert completion.finish == "stop"


def test_a_thinking_limit_of_zero_leaves_the_thinking_empty():
    waste = [65] * len(_ids("\n</think>\n\n"))
    completion = _run([*waste, *_ids("Yes"), STOP], _rules(0))
    assert _regions(completion) == ["", "\n</think>\n\n", "Yes"]


def test_thinking_that_closes_at_its_last_token_is_not_forced():
    completion = _run([*_ids("abc</think>Yes"), STOP], _rules(4))
    assert _regions(completion) == ["abc", "</think>", "Yes"]
    assert not completion.forced_close


@pytest.mark.parametrize("end", ["</think>", "\n</think>\n\n"])
def test_the_answer_limit_counts_answer_tokens_alone(end):
    completion = _run(_ids(f"ab{end}0123456789"), _rules(max_answer=4))
    assert completion.answer == "0123"
    assert completion.finish == "length"


def test_without_a_thinking_format_everything_is_the_answer():
    completion = _run([*_ids("a</think>b"), STOP], _rules(thinking=False))
    assert _regions(completion) == ["", "", "a</think>b"]
    assert completion.closed


def test_endless_white_space_after_the_tag_ends_too():
    rules = _rules(max_thinking=4, max_answer=3)
    completion = _run(_ids("a</think>") + _ids("\n") * 50, rules)
    assert completion.finish == "length"
    assert len(completion.token_ids) - len(PROMPT) <= rules.budget


def test_a_tag_of_several_tokens_is_found_by_its_text():
    tokenizer = tiny_tokenizer(tags=False)
    assert len(tokenizer("</think>", add_special_tokens=False)["input_ids"]) == 8
    fmt = thinking_format(tokenizer)
    sampling = Sampling(temperature=0, max_thinking=50, max_answer=9)
    rules = StoppingRules(tokenizer, fmt, sampling, frozenset({STOP}))
    tokens = tokenizer("a > b\n</think>\n\nYes", add_special_tokens=False)
    completion = _run([*tokens["input_ids"], STOP], rules)
    assert (completion.thinking, completion.answer) == ("a > b", "Yes")
    start, end = completion.spans.end_template
    assert tokenizer.decode(completion.token_ids[start:end]) == "\n</think>\n\n"


def test_the_closest_choice_is_kept():
    row = GenerationState(0, PROMPT, _rules())
    for gap, margin in ((3.0, 0.5), (0.25, 0.75), (2.0, 0.125)):
        row.push(Choice(65, gap, margin))
    completion = row.complete()
    assert (completion.min_top2_gap, completion.min_margin) == (0.25, 0.125)


@pytest.mark.parametrize(
    "change",
    [{"temperature": -1}, {"top_p": 0}, {"max_thinking": -1}, {"max_answer": 0}],
)
def test_settings_out_of_range_are_refused(change):
    settings = {"temperature": 1, "max_thinking": 5, "max_answer": 5}
    with pytest.raises(SettingsError):
        Sampling(**{**settings, **change})


@pytest.mark.parametrize(
    ("n_tokens", "written", "says"),
    [
        (0, 4, "prompts of 1 to 12 tokens"),
        (13, 4, "found 13 tokens in prompt 7"),
        (3, 16, "found one of up to 16 tokens"),
        (3, 100_000, "fits in the model's 16 tokens"),
    ],
)
def test_a_prompt_without_room_is_told_of_in_numbers_that_can_be(
    n_tokens, written, says
):
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        require_room(n_tokens, 7, 16, written)
    assert "-" not in str(caught.value)
