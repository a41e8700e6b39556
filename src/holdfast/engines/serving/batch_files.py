"""Batch files: the requests of a run as OpenAI and vLLM take them, one in each line."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.data.chat.rendering import rendering_of
from holdfast.engines.port import Ask
from holdfast.engines.rounds import SEEDS
from holdfast.engines.serving.replies import encode
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter

URL = "/v1/chat/completions"


def batch_lines(
    asks: Iterable[tuple[str, Ask]], model: str, adapter: Adapter, sampling: Sampling
) -> str:
    """Return the lines of a batch.

    `asks`: What is asked, by the name under which its answer comes back.
    `model`: Name of the model where the batch is run.
    """
    thinking, tokenizer = adapter.thinking, adapter.tokenizer
    limit = sampling.max_answer
    if thinking is not None:
        end = encode(tokenizer, thinking.end_template)
        limit += sampling.max_thinking + len(end)
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    options: Mapping[str, Any] = rendering_of(tokenizer).options
    if options:
        common["chat_template_kwargs"] = dict(options)
    lines = []
    for name, ask in asks:
        body = common | {"messages": list(ask.messages), "seed": ask.seed % SEEDS}
        line = {"custom_id": name, "method": "POST", "url": URL, "body": body}
        lines.append(json.dumps(line, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)
