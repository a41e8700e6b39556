"""Small chat templates of our own that behave like well-known ones.

Each is a template and what a reader of it must find: the format's tags, what stands
between a thought and its answer, and how a fresh prompt ends.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from holdfast.data.chat.thinking import ThinkingFormat

LINES = "\n</think>\n\n"
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Past turns lose their thought; the tag is mentioned for that alone.
STRIPS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}"
    "{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENED = STRIPS.replace("t %}<|assistant|>", "t %}<|assistant|><think>\n")


def _fields(before: str, after: str, prompt: str, empty: str | None = None) -> str:
    """Return a template that writes a thought given in `reasoning_content`."""
    otherwise = "" if empty is None else f"{{% else %}}{empty}"
    return (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{% if m.reasoning_content %}"
        f"{before}{{{{ m.reasoning_content }}}}{after}{otherwise}{{% endif %}}"
        "{% endif %}{{ m.content }}<|end|>{% endfor %}"
        f"{{% if add_generation_prompt %}}<|assistant|>{prompt}{{% endif %}}"
    )


def _unless(name: str, closed: str) -> str:
    return f"{{% if {name} is defined and not {name} %}}{closed}{{% endif %}}"


HYBRID = _fields(
    "<think>\n",
    LINES,
    _unless("enable_thinking", "<think>\n\n</think>\n\n"),
    "<think>\n\n</think>\n\n",
)
CLOSED = STRIPS.replace(
    "t %}<|assistant|>",
    "t %}<|assistant|>{% if enable_thinking is defined and enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}",
)
OFF = (
    "{% if thinking %}<|system|>Write your thoughts between <think></think> first."
    "<|end|>{% endif %}" + PLAIN
)
DATED = (
    "<|system|>{% set now = strftime_now('%d %B %Y') %}Today is {{ now }}.<|end|>"
    + PLAIN[:-11]
    + _unless("enable_thinking", "<think>\n\n</think>\n")
    + "{% endif %}"
)
CHUNKS = (
    "{% if messages[0].role != 'system' %}<|system|>Draft first, like this: "
    "[THINK]Your draft.[/THINK]Then the reply.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'thinking' %}"
    "[THINK]{{ c.thinking }}[/THINK]{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}"
)
CHUNKS_IN_CHUNKS = CHUNKS.replace("{{ c.thinking }}", "{{ c.thinking[0].text }}")
NO_NEWLINE = _fields(
    "<think>", "</think>\n", _unless("enable_thinking", "<think></think>")
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
)
COMMENT = "{# A sibling of this model writes <think> and </think>. #}" + PLAIN
SENTENCE = "<|system|>Answer at once. Never write <think>notes</think>.<|end|>" + PLAIN
TOLD = (
    "<|system|>Reply in two parts: <think> {your notes} </think> {your answer}<|end|>"
    + PLAIN
)
# The tags are named first, and shown with something between them only after that.
NAMED_FIRST = TOLD.replace("parts: ", "parts, with <think> </think> tags, that is, ")
# A turn is ended by nothing but the mark of the next one, and a line before the tag
# is the model's own.
NEXT_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{{ '\\n<think>' + m.reasoning_content }}</think>"
    "{% endif %}{% endif %}{{ '\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '\\n<think></think>' }}{% endif %}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<|channel|>analysis<|message|>"
    "{{ m.reasoning_content }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ALWAYS = PLAIN.replace("t %}<|assistant|>", "t %}<|assistant|><think>")
DOUBLED = _fields("", "\n</think>\n", "<think>\n").replace(
    "{% if m.reasoning_content %}", "<think>\n{% if m.reasoning_content %}"
)
SEED = HYBRID.replace("think>", "seed:think>")
VALUE = OFF.replace("{% if thinking %}", "{% if thinking_mode == 'on' %}")


class Case(NamedTuple):
    """A template, and what must be read off it."""

    template: str
    expected: ThinkingFormat | None
    options: Mapping[str, Any] = MappingProxyType({})
    name: str = "model"
    thinking: str = "auto"


def _think(end: str, opened: bool = False, before: str = "<think>\n") -> ThinkingFormat:
    return ThinkingFormat("<think>", "</think>", end, opened, before)


_ON, _SWITCH_OFF = {"enable_thinking": True}, {"enable_thinking": False}
_R1 = "DeepSeek-R1-Distill-Qwen-7B"
_MARKS = ThinkingFormat("[THINK]", "[/THINK]", "[/THINK]", False, "[THINK]")
_ANALYSIS = "<|channel|>analysis<|message|>"
_FINAL = "<|channel|>final<|message|>"
CASES = {
    "hybrid": Case(HYBRID, _think(LINES)),
    "hybrid, switched off": Case(HYBRID, None, _SWITCH_OFF),
    "hybrid, off": Case(HYBRID, None, thinking="off"),
    "opened": Case(OPENED, _think(LINES, True)),
    "opened, under any name": Case(OPENED, _think(LINES, True), name=_R1),
    "bare, known by name": Case(STRIPS, _think(LINES), name=f"deepseek-ai/{_R1}"),
    "bare, only strips": Case(STRIPS, None),
    "closed by default": Case(CLOSED, None),
    "closed, switched on": Case(CLOSED, _think(LINES, True), _ON),
    "closed, required": Case(CLOSED, _think(LINES, True), thinking="required"),
    "off by default": Case(OFF, None),
    "off, switched on": Case(OFF, _think(LINES), {"thinking": True}),
    "off, required": Case(OFF, _think(LINES), thinking="required"),
    "another switch": Case(VALUE, None),
    "another switch, required": Case(VALUE, _think(LINES), thinking="required"),
    "dated": Case(DATED, _think("\n</think>\n")),
    "chunks": Case(CHUNKS, _MARKS),
    "chunks inside chunks": Case(CHUNKS_IN_CHUNKS, _MARKS),
    "no newline": Case(NO_NEWLINE, _think("</think>\n", before="<think>")),
    "no newline, off": Case(NO_NEWLINE, None, thinking="off"),
    "no word of it": Case(PHI, None),
    "no word of it, known": Case(
        PHI, _think(LINES), name="/models/Phi-4-mini-reasoning/"
    ),
    "a comment": Case(COMMENT, None),
    "a sentence that forbids": Case(SENTENCE, None),
    "a prompt that tells": Case(TOLD, _think(LINES)),
    "a prompt that names, then tells": Case(NAMED_FIRST, _think(LINES)),
    "a line before the tag": Case(NEXT_ENDS, _think("</think>\n", before="\n<think>")),
    "channels": Case(
        CHANNELS,
        ThinkingFormat(
            _ANALYSIS,
            _FINAL,
            f"<|end|><|start|>assistant{_FINAL}",
            False,
            _ANALYSIS,
        ),
    ),
    "opened without newline": Case(ALWAYS, _think(LINES, True, "<think>")),
    "opened before a field": Case(DOUBLED, _think("\n</think>\n", True)),
    "tags of another name": Case(
        SEED,
        ThinkingFormat(
            "<seed:think>",
            "</seed:think>",
            "\n</seed:think>\n\n",
            False,
            "<seed:think>\n",
        ),
    ),
    "plain": Case(PLAIN, None),
}
