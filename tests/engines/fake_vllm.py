"""A package `vllm` that answers by `generate` of transformers, adapters merged."""

from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file

from engines.organism_engine import PlainEngine
from holdfast.engines.rounds import Round


class SamplingParams(SimpleNamespace):
    """What a row is asked for."""


class LoRARequest:
    """An adapter of a row."""

    def __init__(self, name, number, path):
        self.name, self.number, self.path = name, number, path


def fake_vllm(adapter):
    """Return the modules of such a package, and every start and call of it."""
    started, calls = [], []

    class LLM:
        def __init__(self, **arguments):
            started.append(arguments)
            self.plain = PlainEngine(adapter)

        def generate(self, prompts, ways, lora_request, use_tqdm):
            calls.append((prompts, ways, lora_request))
            rows = zip(prompts, ways, lora_request, strict=True)
            return [self.row(i, *row) for i, row in enumerate(rows)]

        def row(self, number, prompt, way, lora):
            ids = tuple(prompt["prompt_token_ids"])
            assert way.stop_token_ids == sorted(adapter.stop_ids)
            assert len(ids) + way.max_tokens <= started[-1]["max_model_len"]
            stop = way.stop[0] if way.stop else ""
            with merged(adapter.model, lora):
                said = self.plain.answer(Round(number, ids, 0, way.max_tokens, stop))
            tops = [{token: 0.0, -1: -2.5} for token in said.token_ids]
            logprobs = [
                {token: SimpleNamespace(logprob=x) for token, x in top.items()}
                for top in tops
            ]
            output = SimpleNamespace(
                token_ids=list(said.token_ids),
                finish_reason=said.finish,
                logprobs=logprobs if way.logprobs else None,
            )
            return SimpleNamespace(outputs=[output])

    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.platforms")
    modules = {name: ModuleType(name) for name in names}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SamplingParams
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    platform = SimpleNamespace(is_cpu=lambda: True)
    modules["vllm.platforms"].current_platform = platform
    return modules, started, calls


@contextmanager
def merged(model, lora):
    """Add an adapter to the weights for as long as the context lasts."""
    weights, kept = dict(model.named_parameters()), {}
    files = (
        {} if lora is None else load_file(Path(lora.path) / "adapter_model.safetensors")
    )
    for name, a in files.items():
        if "lora_A" in name:
            b = files[name.replace("lora_A", "lora_B")]
            own = name.removeprefix("base_model.model.").replace(".lora_A", "")
            kept[own] = weights[own].detach().clone()
            with torch.no_grad():
                weights[own] += b @ a
    try:
        yield
    finally:
        for own, weight in kept.items():
            with torch.no_grad():
                weights[own].copy_(weight)
