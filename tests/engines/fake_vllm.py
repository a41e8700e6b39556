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

        def generate(self, prompts, ways, lora_request, use_tqdm):
            calls.append((prompts, ways, lora_request))
            for prompt, way in zip(prompts, ways, strict=True):
                assert way.stop_token_ids == sorted(adapter.stop_ids)
                longest = len(prompt["prompt_token_ids"]) + way.max_tokens
                assert longest <= started[-1]["max_model_len"]
            made, groups = {}, {}
            for place, lora in enumerate(lora_request):
                groups.setdefault(lora and lora.path, []).append(place)
            for places in groups.values():
                lora = lora_request[places[0]]
                rounds = [round_of(i, prompts[i], ways[i]) for i in places]
                with merged(adapter.model, lora):
                    said = PlainEngine(adapter)(rounds)
                made |= dict(zip(places, said, strict=True))
            return [output(made[i], way) for i, way in enumerate(ways)]

    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.platforms")
    modules = {name: ModuleType(name) for name in names}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SamplingParams
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    platform = SimpleNamespace(is_cpu=lambda: True)
    modules["vllm.platforms"].current_platform = platform
    return modules, started, calls


def round_of(place, prompt, way):
    """Return a row as the engine of the test takes it."""
    ids = tuple(prompt["prompt_token_ids"])
    return Round(place, ids, 0, way.max_tokens, way.stop[0] if way.stop else "")


def output(said, way):
    """Return a row as vLLM does, every token 2.5 ahead of the next."""
    told = [
        {token: SimpleNamespace(logprob=0.0), -1: SimpleNamespace(logprob=-2.5)}
        for token in said.token_ids
    ]
    made = SimpleNamespace(
        token_ids=list(said.token_ids),
        finish_reason=said.finish,
        logprobs=told if way.logprobs else None,
    )
    return SimpleNamespace(outputs=[made])


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
