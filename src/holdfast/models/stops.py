"""Tokens that end an answer: by configurations, by tokenizer, and by the template."""

from typing import Any, NamedTuple

from holdfast.data.chat.thinking import ThinkingFormat, turn_end


class Stops(NamedTuple):
    """Tokens that end an answer."""

    known: frozenset[int]  # Those of generation_config, config and tokenizer.
    # What the chat template writes behind a reply; None if that is no token of its own.
    turn_end: int | None

    @property
    def ids(self) -> frozenset[int]:
        """All of them: a model that ends its turn has ended its answer."""
        return self.known | ({self.turn_end} if self.turn_end is not None else set())

    @property
    def unknown_end(self) -> bool:
        """Whether the template ends turns with a token that nothing else names."""
        return self.turn_end is not None and self.turn_end not in self.known


def find_stops(model: Any, tokenizer: Any, thinking: ThinkingFormat | None) -> Stops:
    """Return the tokens that end an answer."""
    text_config = getattr(model.config, "get_text_config", lambda: None)()
    named = (getattr(model, "generation_config", None), model.config, text_config)
    found = [getattr(each, "eos_token_id", None) for each in (*named, tokenizer)]
    lists = [each if isinstance(each, list | tuple) else [each] for each in found]
    known = frozenset(int(each) for one in lists for each in one if each is not None)
    return Stops(known, None if tokenizer is None else turn_end(tokenizer, thinking))
