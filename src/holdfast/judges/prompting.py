"""From an exchange to the tokens a guard model reads, markers broken up.

What a completion says must never be read as the judge's own prompt. So every special
token of the tokenizer and every marker of the template that occurs in the request or
in the response is broken up by one space before the template is filled, and the
number of special tokens in the result is checked against the template's own.
"""

import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from holdfast.errors import ModelError
from holdfast.judges.contract import Exchange

GENERIC_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|eot|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|header_start|>"),
    *("<|header_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>"),
    *("<end_of_turn>", "<s>", "</s>", "<bos>", "<eos>", "<think>", "</think>"),
)
"""Turn markers of common templates, for judges whose tokenizer is out of reach."""


class Published(NamedTuple):
    """A prompt template as it was published, and where it was read."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@cache
def published(name: str) -> Published:
    """Return a published template by name, byte for byte."""
    stored = json.loads(
        files("holdfast.judges").joinpath("templates.json").read_text(encoding="utf-8")
    )[name]
    return Published("\n".join(stored["lines"]), stored["source"])


def fill(template: str, **slots: str) -> str:
    """Fill the slots of a template in one pass.

    Braces elsewhere, and slot names inside what is filled in, stay as they are.

    Args:
        template: Text with slots such as `{request}`.
        slots: What goes into each slot.
    """
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in slots))
    return pattern.sub(lambda found: slots[found[0][1:-1]], template)


def break_markers(text: str, markers: tuple[str, ...]) -> tuple[str, int]:
    """Break up every marker in a text by a space after its first character.

    Args:
        text: A request or a response.
        markers: What must not occur, compared without regard to case.

    Returns:
        The text without any marker, and how many there were.
    """
    longest_first = sorted(set(markers), key=lambda marker: (-len(marker), marker))
    if not longest_first:
        return text, 0
    pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
    total = 0
    # Breaking one marker may bring the parts of another together, as in
    # "<<|x|>|x|>"; each round makes the text longer between its characters, and a
    # broken marker never matches again, so this ends.
    while True:
        text, count = pattern.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        if not count:
            return text, total
        total += count


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens of a tokenizer that steer a model, by their text.

    Added tokens that are ordinary text, such as runs of line ends, are left out.
    """
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if len(token.content) > 1
        and (token.special or re.fullmatch(r"<\|?/?\w+\|?>", token.content))
    }


def chat_text(tokenizer: Any, exchange: Exchange, **variables: Any) -> str:
    """Render an exchange by the judge's own chat template.

    Templates of text-only models take a message as text, those of models with eyes
    as a list of parts; the form that shows the response is the right one.

    Args:
        tokenizer: Tokenizer with a chat template.
        exchange: Request and response.
        variables: Further variables of the template.

    Raises:
        ModelError: If the template shows not both of them, in either form.
    """
    pair = (("user", exchange.request), ("assistant", exchange.response))
    reason = "neither form of a message shows both"
    for parts in (False, True):
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            if parts
            else {"role": role, "content": text}
            for role, text in pair
        ]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        except Exception as error:  # A template is a program and may raise anything.
            reason = f"{type(error).__name__}: {error}"
            continue
        if all(part.strip() in text for _, part in pair):
            return str(text)
    raise ModelError(
        "a chat template that shows the judge the request and the response",
        reason,
        "Use the guard model's own tokenizer, or name another --judge-template.",
    )


def encode(tokenizer: Any, text: str, *, add_bos: bool) -> list[int]:
    """Tokenise a rendered prompt; a template that writes its own BOS gets no second.

    Args:
        tokenizer: The judge's tokenizer.
        text: The whole prompt.
        add_bos: Whether the template leaves the first token to the tokenizer.
    """
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if add_bos and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id), *token_ids]
    return list(token_ids)
