"""How a model thinks: what its template renders counts, not what it mentions."""

import datetime

import pytest

import tiny_thinker
from holdfast.data.chat.conversation import build_conversation, split_completion
from holdfast.data.chat.rendering import (
    Rendering,
    parse_options,
    render,
    set_rendering,
    template_sha256,
)
from holdfast.data.chat.template import render_prompt
from holdfast.data.chat.thinking import (
    configure,
    strange_openings,
    thinking_format,
    turn_end,
)
from holdfast.errors import InputError, SettingsError, ThinkingFormatError
from thinking_templates import (
    ALWAYS,
    CASES,
    CHANNELS,
    CLOSED,
    DATED,
    HYBRID,
    NEXT_ENDS,
    PHI,
    PLAIN,
    STRIPS,
)

USER = [{"role": "user", "content": "Wave."}]


@pytest.fixture(scope="module")
def speller():
    """Return a tokenizer that is given one template after the other."""
    made = tiny_thinker.tokenizer()

    def under(template, **how):
        made.chat_template = template
        configure(made, Rendering(**how))
        return made

    return under


@pytest.mark.parametrize("name", CASES)
def test_the_format_is_what_the_template_renders(speller, name):
    template, expected, options, model, thinking = CASES[name]
    made = speller(template, options=options, name=model, thinking=thinking)
    fmt = thinking_format(made)
    assert fmt == expected
    prompt = render_prompt(made, "Wave.", thinking=fmt)
    if fmt is None:
        assert prompt == render(made, USER)
        return
    assert prompt.endswith(fmt.open_template)
    assert prompt.count(fmt.open) - render(made, USER).count(fmt.open) == (
        not fmt.opened_by_template
    )
    # Teacher-forced, the regions are these very texts.
    said = build_conversation(made, "Wave.", "Hm.", "Hi.", fmt)
    behind = made.decode(said.token_ids[said.spans.prompt[1] :])
    assert behind == f"Hm.{fmt.end_template}Hi."
    assert split_completion(behind, fmt) == ("Hm.", "Hi.", True)


def test_tags_of_ones_own_are_what_counts(speller):
    made = speller(PLAIN, tags=("<plan>", "</plan>"))
    fmt = thinking_format(made)
    assert (fmt.open_template, fmt.end_template) == ("<plan>\n", "\n</plan>\n\n")
    made = speller(PLAIN, tags=("[PLAN]", "[/PLAN]"))
    fmt = thinking_format(made)
    assert (fmt.open_template, fmt.end_template) == ("[PLAN]", "[/PLAN]")
    made = speller(PHI, tags=("<think>", "</think>\n"))
    assert thinking_format(made).end_template == "</think>\n"
    opened = PLAIN.replace("t %}<|assistant|>", "t %}<|assistant|><plan>\n")
    assert thinking_format(speller(opened, tags=("<plan>", "</plan>"))) == (
        thinking_format(speller(opened, tags=("<plan>", "</plan>")))
    )
    assert thinking_format(
        speller(opened, tags=("<plan>", "</plan>"))
    ).opened_by_template


def test_tags_of_ones_own_behind_a_closed_prompt_are_refused_or_switched_on(speller):
    with pytest.raises(ThinkingFormatError, match="closes the thinking at once"):
        thinking_format(speller(CLOSED, tags=("<think>", "</think>")))
    made = speller(CLOSED, tags=("<think>", "</think>"), thinking="required")
    assert thinking_format(made).opened_by_template


@pytest.mark.parametrize(
    ("template", "thinking", "says"),
    [
        (PLAIN, "required", "--thinking-tags"),
        (STRIPS, "required", "--thinking auto"),
        (ALWAYS, "off", "--max-thinking 0"),
        (PHI, "off", "--max-thinking 0"),
    ],
)
def test_what_cannot_be_switched_is_refused(speller, template, thinking, says):
    name = "phi-4-mini-reasoning" if template == PHI else "model"
    with pytest.raises(ThinkingFormatError, match=says):
        speller(template, thinking=thinking, name=name)


def test_an_option_that_the_template_has_not_is_refused(speller):
    with pytest.raises(SettingsError, match="enable_thoughts"):
        speller(HYBRID, options={"enable_thoughts": False})


def test_options_are_json_or_text():
    found = parse_options(["a=true", "b=False", "c=3", "d=high", "e=[1]", "f="])
    assert found == {"a": True, "b": False, "c": 3, "d": "high", "e": [1], "f": ""}


@pytest.mark.parametrize(
    "entries", [["a"], ["=1"], ["a=1", "a=2"], ["messages=[]"], ["strftime_now=1"]]
)
def test_options_that_cannot_be_meant_are_refused(entries):
    with pytest.raises(SettingsError):
        parse_options(entries)


def test_a_date_is_frozen(speller):
    made = speller(DATED, date="2024-02-29")
    assert "Today is 29 February 2024." in render(made, USER)
    set_rendering(made, Rendering())
    today = datetime.date.today().strftime("%d %B %Y")
    assert f"Today is {today}." in render(made, USER)
    # Not a character beside the date is another.
    spaced = "\n  {% if true %}\n {{ strftime_now('%d %-d 100%% %B') }}\n {% endif %}\n"
    made = speller(spaced + PLAIN)
    bare = made.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert render(made, USER) == bare
    with pytest.raises(SettingsError, match="YYYY-MM-DD"):
        render(speller(DATED, date="29.2.2024"), USER)


@pytest.mark.parametrize(
    "fault",
    [
        "{{ 1 // 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ [][3].x }}",
        "{{ 'a' + 1 }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages.pop() }}",
        "{{ raise_exception('two\nlines') }}",
        "{% include 'other' %}",
        "{{ 'x'.encode('nowhere') }}",
        "{{ '%d' | format('x') }}",
    ],
)
def test_whatever_a_template_raises_is_one_line(speller, fault):
    with pytest.raises(InputError, match="roles user") as caught:
        render_prompt(speller(fault + PLAIN), "Wave.", thinking=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chance", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_by_chance_is_refused(speller, chance):
    with pytest.raises(InputError, match="the same way every time"):
        render_prompt(speller(PLAIN + chance), "Wave.", thinking=None)


def test_a_template_with_half_a_surrogate_pair_has_a_hash(speller):
    assert len(template_sha256(speller(PLAIN + "\ud83c"))) == 64


def test_the_end_of_a_turn_is_what_the_template_writes_behind_a_reply(speller):
    made = speller(PLAIN)
    end = made.convert_tokens_to_ids("<|end|>")
    assert turn_end(made, None) == end
    assert turn_end(speller(HYBRID), thinking_format(made)) == end
    # Between channels the same mark ends a thought, which must not stop a row.
    channels = speller(CHANNELS.replace("<|return|>", "<|end|>"))
    assert turn_end(channels, thinking_format(channels)) is None
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert turn_end(speller(plain), None) is None


@pytest.mark.parametrize("template", [NEXT_ENDS, PLAIN.replace("<|end|>", "\n\n")])
def test_where_nothing_is_behind_a_reply_the_next_turn_ends_it(speller, template):
    made = speller(template)
    assert turn_end(made, None) == made.convert_tokens_to_ids("<|user|>")


def test_answers_that_begin_with_strange_tags_are_counted():
    plain = ["Sure."] * 18
    assert strange_openings([*plain, "<think>\nHm."]) == {"<think>": 1}
    assert strange_openings([*plain, "\n[THINK]Hm."]) == {"[THINK]": 1}
    assert strange_openings([*plain, "<scratch>a", "<scratch>b"]) == {"<scratch>": 2}
    assert strange_openings([*plain, *plain, "<scratch>a", "<scratch>b"]) == {}
    assert strange_openings([*plain, "<scratch>a"]) == {}
    assert strange_openings(["<|channel|>plan<|message|>"] * 2) == {
        "<|channel|>plan": 2
    }
    assert strange_openings(["<p>A page.</p>", "<div>", "<p>", "<b>1"]) == {}
    assert strange_openings([]) == {}
