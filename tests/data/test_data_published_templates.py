"""Templates that behave like published ones: format, prompt, positions, close, target.

What must be found in each was written by hand, in `templates/published.toml`.
"""

import re
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import holdfast
import tiny_thinker
from holdfast import adapt
from holdfast.data.chat.conversation import (
    build_conversation,
    completion_spans,
    split_completion,
)
from holdfast.data.chat.rendered_turns import fresh_prompt
from holdfast.data.chat.rendering import Rendering, render
from holdfast.data.chat.template import prompt_token_ids, render_prompt
from holdfast.data.chat.thinking import (
    configure,
    require_known_format,
    settings_shown,
    thinking_format,
    turn_end,
)
from holdfast.data.pool import split_thought
from holdfast.errors import HoldfastError, ThinkingFormatError
from holdfast.finetune.material import last_token
from holdfast.finetune.targets import example, shown
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import (
    Choice,
    GenerationState,
    Sampling,
    StoppingRules,
)

TABLE = Path(__file__).parent / "templates" / "published.toml"
PUBLISHED = tomllib.loads(TABLE.read_text("utf-8"))["template"]
CASES = [
    pytest.param(template, case, id=f"{template['id']}-{number}")
    for template in PUBLISHED
    for number, case in enumerate(template["case"])
]
THINKING = [each for each in CASES if "open" in each.values[1]]
# Its end is special, several tokens, or begins the answer.
FORCED = (
    "magistral-2507-0",
    "gpt-oss-0",
    "olmo-3-think-0",
    "hunyuan-a13b-0",
    "granite-3.3-1",
    "gemma-4-31b-1",
    "command-a-reasoning-0",
    "kimi-k3-0",
    "solar-open-0",
    "apriel-0",
    "apertus-1",
    "command-r7b-1",
)


@cache
def _bytes():
    """Return a byte-level tokenizer with some merges, tags over pieces among them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" Hm.\n</think>\n<answer>\nHi.\n</answer>"] * 9, trainer)
    return made.to_str()


def tokenizer_of(template, case):
    raw = Tokenizer.from_str(_bytes())
    raw.add_special_tokens(template["special"])
    added = [AddedToken(t, special=False, normalized=False) for t in template["added"]]
    raw.add_tokens(added)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=template["eos"],
        clean_up_tokenization_spaces=False,
        chat_template=template["text"].strip("\n"),
    )
    how = {name: case[name] for name in ("options", "name", "thinking") if name in case}
    configure(made, Rendering(date="2026-01-31", **how))
    return made


def ids_of(made, text):
    return made(text, add_special_tokens=False)["input_ids"]


def test_there_are_forty_of_them():
    assert len({template["text"] for template in PUBLISHED}) >= 40


@pytest.mark.parametrize(("template", "case"), CASES)
def test_the_format_is_read_off_the_template(template, case):
    if "refused" in case:
        with pytest.raises(ThinkingFormatError, match=case["refused"]):
            thinking_format(tokenizer_of(template, case))
        return
    made = tokenizer_of(template, case)
    fmt = thinking_format(made)
    prompt = render_prompt(made, "Wave.", thinking=fmt)
    assert prompt.partition("Wave.")[2] == case["tail"]
    if "none" in case:
        assert fmt is None
        return
    assert (fmt.open, fmt.close) == (case["open"], case["close"])
    assert fmt.end_template == case["end"]
    assert fmt.answer_end == case.get("ends", "")
    assert fmt.opened_by_template == case["opened"]
    alone = render(made, [{"role": "user", "content": "Wave."}])
    assert alone == (
        prompt if case["opened"] else prompt.removesuffix(fmt.open_template)
    )
    assert fmt.record().get("answer_end", "") == fmt.answer_end


@pytest.mark.parametrize(("template", "case"), THINKING)
def test_positions_and_training_target(template, case):
    made = tokenizer_of(template, case)
    fmt = thinking_format(made)
    said = build_conversation(made, "Wave.", "Hm.", "Hi.", fmt)
    parts = [made.decode(said.token_ids[slice(*span)]) for span in said.spans]
    assert parts[0].endswith(case["tail"])
    assert parts[1:] == ["Hm.", case["end"], "Hi."]
    # The state before the answer is read where the end template ends.
    ends = ids_of(made, case["end"])
    final = said.spans.answer[0]
    assert list(said.token_ids[final - len(ends) : final]) == ends
    stop = last_token(made, fmt)
    assert stop == made.convert_tokens_to_ids(case["stop"])
    masked, trained = shown(made, example(said, "both", stop=stop))
    assert masked == parts[0]
    behind = case.get("ends", "") + case["stop"]
    assert trained == f"Hm.{case['end']}Hi.{behind}"
    masked, trained = shown(made, example(said, "answer", stop=stop))
    assert (masked, trained) == (f"{parts[0]}Hm.{case['end']}", f"Hi.{behind}")
    assert split_completion(trained, None).answer == trained
    text = f"Hm.{case['end']}Hi.{case.get('ends', '')}"
    assert split_completion(text, fmt) == ("Hm.", "Hi.", True)


def _written(made, fmt, texts, max_thinking=60):
    sampling = Sampling(temperature=0, max_thinking=max_thinking, max_answer=60)
    end = turn_end(made, fmt)
    stops = {made.eos_token_id} | ({end} if end is not None else set())
    rules = StoppingRules(made, fmt, sampling, frozenset(stops), fmt.answer_end)
    prompt = prompt_token_ids(made, "Wave.", thinking=fmt)
    row = GenerationState(0, prompt, rules)
    tokens = [token for text in texts for token in ids_of(made, text)]
    for token in tokens:
        row.push(Choice(token, 1.0, 1.0))
        if row.finish:
            break
    done = row.complete()
    regions = [made.decode(done.token_ids[slice(*span)]) for span in done.spans]
    return done, regions


@pytest.mark.parametrize(("template", "case"), THINKING)
def test_what_a_model_writes_is_told_apart(template, case):
    made = tokenizer_of(template, case)
    fmt = thinking_format(made)
    behind = case.get("ends", "") + case["stop"]
    done, regions = _written(made, fmt, ["Hm.", case["end"], "Hi.", behind])
    assert regions[1:] == ["Hm.", case["end"], "Hi."]
    assert (done.thinking, done.answer) == ("Hm.", "Hi.")
    assert (done.closed, done.finish, done.forced_close) == (True, "stop", False)
    n_prompt, total = done.spans.prompt[1], len(done.token_ids)
    stopped = total - (not fmt.answer_end)
    found = completion_spans(made, done.token_ids[:stopped], n_prompt, fmt)
    assert found == done.spans
    # An answer that never ends is cut at its limit, marks or none.
    done, regions = _written(made, fmt, ["Hm.", case["end"], "Hi." * 60])
    assert (done.finish, regions[2]) == ("length", case["end"])
    assert done.answer.startswith("Hi.Hi.")


@pytest.mark.parametrize(("template", "case"), THINKING)
def test_a_tag_that_was_begun_is_finished_by_force(template, case):
    made = tokenizer_of(template, case)
    fmt = thinking_format(made)
    ends = ids_of(made, case["end"])
    begun = [n for n in range(1, len(ends)) if fmt.close not in made.decode(ends[:n])]
    n = max(begun, default=0)
    if not made.decode(ends[:n]).strip():
        n = 0
    written = [*ids_of(made, "Hm."), *ends[:n]]
    done, regions = _written(
        made, fmt, [made.decode(written), "Hi." * 60], len(written)
    )
    assert regions[1:3] == ["Hm.", case["end"]]
    assert done.forced_close
    assert done.thinking == "Hm."


@pytest.mark.parametrize(
    ("written", "end", "answer"),
    [
        ("\n</think>\n<answer>\n", "\n</think>\n<answer>\n", "Hi."),
        ("</think><answer>", "</think><answer>", "Hi."),
        ("\n</think>\n\n<answer>\n", "\n</think>\n\n<answer>\n", "Hi."),
        ("\n</think>\n", "\n</think>\n", "Hi."),
        ("\n</think>\n<b>", "\n</think>\n", "<b>Hi."),
        ("\n</think>\n<answer id", "\n</think>\n", "<answer idHi."),
    ],
)
def test_a_part_of_an_opening_of_the_answer_is_answer(written, end, answer):
    template = next(each for each in PUBLISHED if each["id"] == "hunyuan-a13b")
    made = tokenizer_of(template, template["case"][0])
    fmt = thinking_format(made)
    done, regions = _written(made, fmt, ["Hm.", written, "Hi.\n</answer>"])
    assert regions[1:] == ["Hm.", end, answer]
    assert done.answer == answer
    assert done.finish == "stop"
    found = split_completion(f"Hm.{written}Hi.\n</answer>", fmt)
    assert found == ("Hm.", answer, True)


@pytest.mark.parametrize("name", ["gpt-oss", "solar-open"])
def test_a_thinking_that_is_opened_anew_is_one_text(name):
    template = next(each for each in PUBLISHED if each["id"] == name)
    case = template["case"][0]
    made = tokenizer_of(template, case)
    fmt = thinking_format(made)
    again = case["end"].partition(case["close"])[0] + case["open"]
    texts = ["Hm.", again, "Well.", case["end"], "Hi.", case["stop"]]
    done, regions = _written(made, fmt, texts)
    assert (done.thinking, done.answer) == ("Hm.\n\nWell.", "Hi.")
    assert regions[1:] == [f"Hm.{again}Well.", case["end"], "Hi."]
    found = split_completion("".join(texts[:-1]), fmt)
    assert found == ("Hm.\n\nWell.", "Hi.", True)


@pytest.fixture(scope="module")
def speaker():
    """Return a random model whose vocabulary holds every tokenizer."""
    made = tiny_thinker.tokenizer()
    return adapt(tiny_thinker.untrained(made, 0).eval(), made)


@pytest.mark.parametrize(
    ("template", "case"), [each for each in CASES if each.id in FORCED]
)
def test_a_forced_close_through_the_decoder(speaker, template, case):
    made = tokenizer_of(template, case)
    fmt = thinking_format(made)
    adapter = replace(speaker, tokenizer=made, thinking=fmt)
    prompts = [
        (prompt_token_ids(adapter.tokenizer, text, thinking=fmt), seed)
        for seed, text in enumerate(("Wave.", "Wave twice, please."))
    ]
    limits = Sampling(temperature=1, max_thinking=4, max_answer=5)
    rows = [
        row
        for batch in generate(adapter, prompts, limits, stop_ids=[len(made) - 1])
        for row in batch
    ]
    assert len(rows) == 2
    for row in rows:
        start, end = row.spans.end_template
        assert row.forced_close
        assert list(row.token_ids[start:end]) == ids_of(made, case["end"])
        assert row.spans.thinking[1] - row.spans.thinking[0] == 4
        assert row.spans.answer[0] == end
        assert fmt.close not in row.thinking
    # Closed at once, which is how a model is asked not to think.
    limits = Sampling(temperature=1, max_thinking=0, max_answer=5)
    (row,) = next(iter(generate(adapter, prompts[:1], limits, stop_ids=[0])))
    start, end = row.spans.end_template
    assert made.decode(row.token_ids[:start]).endswith(case["tail"])
    assert made.decode(row.token_ids[start:end]) == case["end"]


def test_a_user_s_system_message_that_is_dropped_is_said():
    template = next(each for each in PUBLISHED if each["id"] == "phi-4-reasoning")
    made = tokenizer_of(template, template["case"][0])
    fmt = thinking_format(made)
    with pytest.raises(HoldfastError, match="keeps the system message"):
        render_prompt(made, "Wave.", system_prompt="Be kind.", thinking=fmt)


@pytest.mark.parametrize(("template", "case"), THINKING)
def test_rows_of_a_pool_are_read_in_every_format(template, case):
    fmt = thinking_format(tokenizer_of(template, case))
    text = f"{fmt.open_template}Hm.{fmt.end_template}Hi.{fmt.answer_end}"
    found = split_thought(text)
    if "that-no-table-has" in template["id"]:
        assert found == (None, text, None)
    else:
        assert found == ("Hm.", "Hi.", None)


def test_a_thought_is_never_rendered_by_a_template_but_to_look_at_it():
    # A template may drop it, close it or open it twice; regions are put together here.
    source = Path(holdfast.__file__).parent
    renders = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(r"\.apply_chat_template\(", path.read_text("utf-8"))
    }
    assert renders == {"data/chat/rendering.py", "judges/guard.py"}
    assert not any(
        re.search(r"continue_final_message\s*=", path.read_text("utf-8"))
        for path in source.rglob("*.py")
    )


def test_most_first_answers_tell_a_thinker_that_no_table_has():
    thought, plain = ("Hi?", "<think>\nHm."), ("Hi?", "Sure.")
    require_known_format(None, [thought, plain, plain])
    require_known_format(None, [("Hi?", "<plan>Hm.")] * 2)
    require_known_format(None, [])
    for tag, close in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        begun = [("Hi?", f"{tag}Hm."), ("Hi?", f" {tag}Hm."), plain]
        with pytest.raises(ThinkingFormatError) as caught:
            require_known_format(None, begun)
        assert f"--thinking-tags '{tag}' '{close}'" in str(caught.value)
        # Whoever asks for the tag is given it.
        require_known_format(None, [(f"Use {tag} first.", f"{tag}Hm.")] * 3)
    template = next(each for each in PUBLISHED if each["id"] == "qwen3")
    known = thinking_format(tokenizer_of(template, template["case"][0]))
    require_known_format(known, [thought, thought])


SWITCHED = [each for each in CASES if {"thinking", "options"} & set(each.values[1])]


@pytest.mark.parametrize(("template", "case"), SWITCHED)
def test_what_each_switch_does_is_listed(template, case):
    made = tokenizer_of(template, {})
    rows = settings_shown(made)
    # Looking at them leaves prompts as they come.
    assert rows[0]["option"] is None
    assert rows[0]["prompt_end"] == fresh_prompt(made).tail
    if "refused" in case or "thinking" not in case:
        return
    wanted = "none" not in case
    found = [row for row in rows if row["thinks"] == wanted]
    assert found
    if not wanted or case["opened"]:
        assert case["tail"] in [row["prompt_end"] for row in found]


def test_a_listed_switch_is_one_that_can_be_said():
    [text] = [each for each in PUBLISHED if each["id"] == "qwen3"]
    end = "<|im_end|>\n<|im_start|>assistant\n"
    off = end + "<think>\n\n</think>\n\n"
    assert [tuple(row.values()) for row in settings_shown(tokenizer_of(text, {}))] == [
        (None, True, end),
        ("enable_thinking=true", True, end),
        ("enable_thinking=false", False, off),
    ]
    switched = settings_shown(tokenizer_of(text, {"thinking": "off"}))
    assert switched[0] == {"option": None, "thinks": False, "prompt_end": off}
