"""How one server is spoken to: by token ids, by text, or by chats, whichever it takes.

Which it is, is tried once with a short prompt. What tells is the number of tokens that
the server has read, or the tokens themselves: a server that puts a template around a
prompt that has one already has read more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from holdfast.data.chat.rendering import render, rendering_of
from holdfast.engines.http import Again, HttpClient
from holdfast.engines.port import Ask
from holdfast.engines.rounds import Round
from holdfast.engines.serving.replies import (
    Sent,
    UnansweredError,
    decode,
    encode,
    sent_of,
)
from holdfast.errors import EndpointError, EngineError, SettingsError
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter

NEUTRAL: dict[str, Any] = {
    # What a server would else take from its own defaults or the model's configuration.
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
IDS: dict[str, Any] = {"return_token_ids": True}
LOGPROBS: dict[str, Any] = {"logprobs": 1, "return_tokens_as_token_ids": True}
RAW: dict[str, Any] = {
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "add_special_tokens": False,
}
Kind = Literal["tokens", "text", "chat"]


class Wire(NamedTuple):
    """How a server is spoken to, and what it tells."""

    kind: Kind  # What a prompt is sent as.
    tells: Mapping[str, Any]  # What makes it tell the tokens that it drew; empty: none.
    extras: bool  # Whether it takes parameters that only some servers have.
    told: Literal["ids", "text"]  # Whether it tells the tokens that it drew.
    # How it is known that it reads the prompt that was meant.
    compared: Literal["tokens", "count", "not"]
    drops_start: bool = False  # Whether it puts the start token before a text itself.

    def record(self) -> dict[str, str]:
        """Return what study and report say of it."""
        return {
            "prompts_sent_as": self.kind,
            "tokens_told_as": self.told,
            "prompts_compared_by": self.compared,
        }


@dataclass(frozen=True)
class Speech:
    """What is said to one server about one model."""

    http: HttpClient  # The way to the server.
    model: str  # Name of the model there.
    adapter: Adapter  # The model here.

    def completion(
        self, wire: Wire, asked: Round, sampling: Sampling, model: str | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return path and body of a round of a row."""
        prompt: Any = list(asked.token_ids)
        if wire.kind == "text":
            prompt = self.text(asked.token_ids, drops_start=wire.drops_start)
        body = self._common(wire, sampling, asked.seed, model)
        body |= {"prompt": prompt, "max_tokens": asked.limit}
        if wire.extras and wire.told == "ids":
            stops = sorted(self.adapter.stop_ids)
            body |= {"stop_token_ids": stops, "include_stop_str_in_output": True}
            # A server that tells its text alone would not say at which mark it ended.
            body |= {"stop": [asked.stop]} if asked.stop else {}
        return "/completions", body

    def chat(
        self, wire: Wire, ask: Ask, sampling: Sampling, limit: int, seed: int
    ) -> tuple[str, dict[str, Any]]:
        """Return path and body of a row that is asked as a chat."""
        body = self._common(wire, sampling, seed, None)
        options = dict(rendering_of(self.adapter.tokenizer).options)
        body |= {"messages": list(ask.messages), "max_tokens": limit}
        if wire.extras and options:
            body["chat_template_kwargs"] = options
        return "/chat/completions", body

    def _common(
        self, wire: Wire, sampling: Sampling, seed: int, model: str | None
    ) -> dict[str, Any]:
        common = {
            "model": model or self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
        return common | (NEUTRAL | RAW | dict(wire.tells) if wire.extras else {})

    def text(self, token_ids: Sequence[int], *, drops_start: bool) -> str:
        """Return a prompt as text, without the start token where the server adds it."""
        start = getattr(self.adapter.tokenizer, "bos_token_id", None)
        ids = list(token_ids)
        if drops_start and ids and ids[0] == start:
            ids = ids[1:]
        return decode(self.adapter.tokenizer, ids)

    def rendered(self, ask: Ask) -> str:
        """Return what our template makes of the messages of a row."""
        return render(self.adapter.tokenizer, ask.messages)

    def once(self, path: str, body: dict[str, Any]) -> Sent | str:
        """Ask once; return the answer, or why there is none.

        Raises:
            EndpointError: If the server is down, or the key is refused.
        """

        def ask() -> Any:
            said = self.http.send(path, body)
            # Some servers fail in this way at a parameter that they do not know.
            broken = isinstance(said, Again) and said.reason.startswith("status 500")
            return said.reason if broken else said

        response = self.http.insist(
            ask, "0" * 8, f"a server at {self.http.url}", "what was drawn is kept."
        )
        if isinstance(response, str):
            return response
        if response.status_code in (401, 403):
            raise EndpointError(
                f"an answer of {self.model} at {self.http.url}",
                f"status {response.status_code}: {self.http.words(response)}",
                f"Put the key into the variable {self.http.reach.key_env}.",
            )
        if response.status_code != 200:
            return f"status {response.status_code}: {self.http.words(response)}"
        try:
            return sent_of(json_of(response))
        except UnansweredError as error:
            return str(error)


def json_of(response: Any) -> Mapping[str, Any]:
    """Return the object that a response holds.

    Raises:
        UnansweredError: If it holds none.
    """
    try:
        body = response.json()
    except (ValueError, RecursionError) as error:
        raise UnansweredError(f"a body that is no JSON ({error})") from error
    if not isinstance(body, Mapping):
        raise UnansweredError("a body that is no JSON object")
    return body


def served_models(http: HttpClient) -> list[str]:
    """Return the names of the models that a server says it has; empty if it does not.

    Raises:
        EndpointError: If it is down.
    """
    response = http.insist(
        lambda: http.send("/models"),
        "0" * 8,
        f"a server at {http.url}",
        "what was drawn is kept.",
    )
    try:
        listed = json_of(response).get("data") if response.status_code == 200 else None
    except UnansweredError:
        listed = None
    rows = listed if isinstance(listed, list) else []
    return [str(each["id"]) for each in rows if isinstance(each, dict) and "id" in each]


def choose_model(http: HttpClient, asked: str | None) -> str:
    """Return the name of the model to ask for.

    Raises:
        SettingsError: If the server does not have it, or has several and none is named.
    """
    known = served_models(http)
    if asked is None and len(known) == 1:
        return known[0]
    latest = f"{asked}:latest"
    if asked is not None and (not known or asked in known or latest in known):
        return asked
    shown = ", ".join(f"`{name}`" for name in known[:12])
    raise SettingsError(
        f"the name of one of the models at {http.url}: {shown or 'it tells none'}",
        "none" if asked is None else f"`{asked}`",
        "Give it with --endpoint-model.",
    )


def find_wire(speech: Speech, ask: Ask) -> Wire:
    """Try how a server takes a prompt, and return the most exact way.

    `ask`: A short prompt.

    Raises:
        EngineError: If it reads another prompt whichever way it is asked: another
            template.
        EndpointError: If it is down, or answers nothing at all.
    """
    reasons = []
    for wire in _candidates(speech, ask):
        said = _try(speech, wire, ask)
        if isinstance(said, Wire):
            return said
        reasons.append(f"{wire.kind}: {said}")
    other = [reason for reason in reasons if _TEMPLATE in reason]
    if other:
        raise EngineError(
            "a server that reads the prompt that the model's template renders",
            "; ".join(dict.fromkeys(other)),
            "Serve the model with its own chat template (vLLM and llama.cpp take it by "
            "a flag), or use an endpoint of completions.",
        )
    raise EndpointError(
        f"an answer of {speech.model} at {speech.http.url}",
        "; ".join(dict.fromkeys(reasons)),
        "Read the server's words above; check its URL, which ends in /v1, and its log.",
    )


_TEMPLATE = "another prompt"
SPELLED = (
    "control tokens that the prompt spells, and that a server of texts would take for "
    "such (--engine hf, or a server that takes token ids, keeps them text)"
)
_FEW = Sampling(temperature=0.0, max_thinking=0, max_answer=1)


def _candidates(speech: Speech, ask: Ask) -> list[Wire]:
    text = decode(speech.adapter.tokenizer, ask.token_ids)
    as_text = encode(speech.adapter.tokenizer, text) == ask.token_ids
    found = [
        Wire("tokens", IDS, True, "ids", "count"),
        Wire("tokens", IDS | LOGPROBS, True, "ids", "count"),
        Wire("tokens", {}, True, "text", "count"),
    ]
    if as_text:
        ids = IDS | LOGPROBS
        found += [
            Wire("text", ids, True, "ids", "count", drops) for drops in (False, True)
        ]
        found += [
            Wire("text", {}, extras, "text", "count", drops)
            for extras in (True, False)
            for drops in (False, True)
        ]
    if ask.messages:
        found += [Wire("chat", {}, extras, "text", "count") for extras in (True, False)]
    return found


def _try(speech: Speech, wire: Wire, ask: Ask) -> Wire | str:
    """Return a wire that works, or why it does not."""
    limit = 2
    if wire.kind == "chat":
        path, body = speech.chat(wire, ask, _FEW, limit, 0)
    else:
        asked = Round(0, tuple(ask.token_ids), 0, limit, "")
        path, body = speech.completion(wire, asked, _FEW)
    sent = speech.once(path, body)
    if isinstance(sent, str):
        return sent
    if wire.told == "ids" and sent.token_ids is None:
        return "it tells no token ids"
    why = other_prompt(speech, wire, ask, sent)
    if why is not None:
        return why
    exact = sent.prompt_ids is not None
    exact = exact or (wire.kind == "chat" and renders_alike(speech, ask))
    if exact:
        return wire._replace(compared="tokens")
    return wire if sent.n_prompt is not None else wire._replace(compared="not")


def other_prompt(
    speech: Speech, wire: Wire, ask: Ask, sent: Sent, asked: Round | None = None
) -> str | None:
    """Return what a server read in place of a prompt; None where they agree.

    `asked`: The round, where the row has begun already.
    """
    ids = tuple(ask.token_ids if asked is None else asked.token_ids)
    tokenizer = speech.adapter.tokenizer
    if wire.kind != "tokens":
        chat, own = wire.kind == "chat", ids
        text = speech.rendered(ask) if chat else speech.text(ids, drops_start=False)
        ids = encode(tokenizer, text)
        read, meant = _controls(tokenizer, ids), _controls(tokenizer, own)
        # Behind what a chat renders, a prompt of ours may open the thinking.
        if read != (meant[: len(read)] if chat else meant):
            return SPELLED
    if sent.prompt_ids is not None and sent.prompt_ids != ids:
        place = _apart(ids, sent.prompt_ids)
        return f"{_TEMPLATE} was read: its tokens differ from token {place} on"
    if sent.n_prompt not in (None, len(ids)):
        return f"{_TEMPLATE} was read: {sent.n_prompt} tokens in place of {len(ids)}"
    return None


def _controls(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return those of some tokens that were added to the vocabulary."""
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    return [token for token in ids if token in added]


def _apart(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Return the first place where two sequences differ."""
    both = min(len(ours), len(theirs))
    return next((i for i in range(both) if ours[i] != theirs[i]), both)


def renders_alike(speech: Speech, ask: Ask) -> bool:
    """Return whether a server was seen to render the messages of a chat alike.

    Raises:
        EngineError: If it renders another prompt.
    """
    root = speech.http.url.removesuffix("/v1")
    ours, tokenizer = speech.rendered(ask), speech.adapter.tokenizer
    options = dict(rendering_of(tokenizer).options)
    body: dict[str, Any] = {"model": speech.model, "messages": list(ask.messages)}
    body |= {"add_generation_prompt": True, "chat_template_kwargs": options}
    rendered = _field(speech.http.send("/apply-template", body, base=root), "prompt")
    if isinstance(rendered, str):
        start = str(getattr(tokenizer, "bos_token", None) or "")
        if rendered.removeprefix(start) == ours.removeprefix(start):
            return True
        raise _another_template(ours, rendered)
    told = _field(speech.http.send("/tokenize", body, base=root), "tokens")
    if not isinstance(told, list) or not told:
        return False
    if told == list(encode(tokenizer, ours)):
        return True
    raise _another_template(ours, decode(tokenizer, told))


def _field(response: Any, name: str) -> Any:
    if isinstance(response, Again) or response.status_code != 200:
        return None
    try:
        return json_of(response).get(name)
    except UnansweredError:
        return None


def _another_template(ours: str, theirs: str) -> EngineError:
    at = _apart(ours, theirs)
    return EngineError(
        f"a server whose chat template renders …{ours[max(0, at - 30) : at + 30]!r}",
        f"{_TEMPLATE}: …{theirs[max(0, at - 30) : at + 30]!r}",
        "Serve the model with its own chat template.",
    )
