"""What clients send: the bodies of requests, checked before anything is done.

A field that would change the answer and is not offered is refused by name: nobody gets
another answer than the one that was asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from holdfast.errors import InputError

_SHAPES = {
    "content": "expected a text, or a list of parts of type `text`",
    "input": "expected a text, a list of texts, a chat (a list of messages), or a list "
    "of chats, of which none is empty",
}
"""What a field holds that may hold one of several shapes."""
Number = Annotated[float, Field(allow_inf_nan=False)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]


def _whole(text: str) -> str:
    # JSON may spell half of a surrogate pair, which no tokenizer can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair, which is no text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Strict(BaseModel):
    """A body without fields that nobody reads, and without conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Part(Strict):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class Message(Strict):
    """A message of a chat."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    # Thinking, under either of the names that servers use.
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    # What was said in place of an answer.
    refusal: Text | None = None
    # What is said without text; nothing here writes or reads it.
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        """The text of the message."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    @property
    def thinking(self) -> str:
        """The thinking that was sent with it."""
        return self.reasoning_content or self.reasoning or ""


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    # What else servers add to a stream, and this one does not.
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class Extension(Strict):
    """What can be asked of the guard itself."""

    steps: bool = True  # Whether scores of single tokens are sent.
    max_thinking: Annotated[int, Field(ge=0, le=1 << 20)] | None = None


class ChatRequest(Strict):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    holdfast: Extension | None = None
    # Told for a gateway's books, and read by nobody here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # These are taken at the one value that leaves the answer as it is.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    repetition_penalty: One | None = None
    repeat_penalty: One | None = None
    top_k: Annotated[int, Field(ge=-1, le=0)] | None = None
    min_p: Zero | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens to write, thinking included."""
        return self.max_completion_tokens or self.max_tokens


Chat = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ModerationRequest(Strict):
    """`POST /v1/moderations`."""

    # A text, several of them, parts of one text, a chat, or several chats.
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | Annotated[list[Part], Field(min_length=1, max_length=256)]
        | Chat
        | Annotated[list[Chat], Field(min_length=1, max_length=256)]
    )
    model: Text | None = None


class GuardrailRequest(BaseModel):
    """`POST /beta/litellm_basic_guardrail_api`, as LiteLLM 1.110 sends it."""

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"]
    texts: list[Text] | None = None
    litellm_call_id: Annotated[str, Field(max_length=256)] | None = None
    structured_messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class Turns:
    """A chat, taken apart as templates need it."""

    def __init__(self, messages: Sequence[Message]) -> None:
        """Read a chat: perhaps a system message, then user and assistant in turn.

        Raises:
            InputError: If the roles stand in another order.
        """
        rest = list(messages)
        self.system: str | None = None
        if rest and rest[0].role in ("system", "developer"):
            self.system = rest.pop(0).text
        roles = [message.role for message in rest]
        wanted = ["user", "assistant"] * (len(rest) // 2 + 1)
        if not rest or roles != wanted[: len(roles)]:
            raise InputError(
                "messages of user and assistant in turn, behind at most one of the "
                "system",
                f"the roles {', '.join(m.role for m in messages)}",
                "Join what one of them says into one message.",
            )
        # The answer that the chat ends with; None where it ends with the user.
        self.answer: Message | None = None
        if rest[-1].role == "assistant":
            self.answer = rest.pop()
        texts = [message.text for message in rest]
        self.asked = texts.pop()
        self.earlier = tuple(zip(texts[::2], texts[1::2], strict=True))


def unread(errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return in words why a request cannot be read, each place once.

    Of a place that may hold one of several shapes the checker tells what each of them
    lacks, under names of its own: there it is said which shapes there are.
    """
    said: dict[str, str] = {}
    for error in errors:
        loc = [part for part in error["loc"] if part != "body"]
        why = _why(error)
        for at, part in enumerate(loc[:-1]):
            if part in _SHAPES:
                loc, why = loc[: at + 1], _SHAPES[part]
                break
        if error["type"] == "json_invalid":
            loc = []
        said.setdefault(".".join(map(str, loc))[:200] or "the body", why)
    return [f"{place}: {why}" for place, why in said.items()]


def _why(error: Mapping[str, Any]) -> str:
    context = error.get("ctx") or {}
    if error["type"] == "json_invalid":
        return f"no JSON at character {error['loc'][-1]} ({context.get('error')})"
    if error["type"] == "extra_forbidden" or context.get("max_length") == 0:
        return "not offered here. Leave it out"
    return str(error["msg"])[:200]
