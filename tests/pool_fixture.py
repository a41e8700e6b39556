"""A pool of the little world, and a probe of its model, made in a second."""

import json

import torch

import tiny_thinker
from holdfast.cliff.probe import fit_probe
from holdfast.cliff.probe_files import model_fingerprint, write_probe
from holdfast.data.chat.conversation import build_conversation
from holdfast.models.hidden_states import final_states
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study


def write_pool(path, n=60):
    """Harmful rows, plain and wrapped, with a safe answer; `song` is what works."""
    rows = []
    for request in tiny_thinker.requests(tiny_thinker.HARM, n):
        for wrapper in (None, "song", "sternly"):
            prompt, thought, _ = tiny_thinker.scene(request, wrapper, True)
            rows.append(
                {
                    "prompt": prompt,
                    "thinking": thought,
                    "response": tiny_thinker.REFUSAL,
                    "category": wrapper or "plain",
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_study(model, folder, flipped=False):
    """A study with a published probe: plain refusals against plain compliances."""
    study = Study.create(folder)
    session = Session(str(model), ModelSettings(device="cpu"))
    session.claim(study)
    adapter = session.adapter
    made, labels = [], []
    for harmful, verbs in ((True, tiny_thinker.HARM), (False, tiny_thinker.CARE)):
        for request in tiny_thinker.requests(verbs, 40):
            prompt, thought, _ = tiny_thinker.scene(request, None, harmful)
            fmt = adapter.thinking
            made.append(build_conversation(adapter.tokenizer, prompt, thought, "", fmt))
            labels.append(harmful != flipped)
    states = final_states(adapter, [each.token_ids for each in made])
    probe = fit_probe(
        states,
        torch.tensor(labels),
        clusters=[str(place) for place in range(len(labels))],
        seed=0,
    )
    write_probe(study, "published", probe, {"model": model_fingerprint(study)})
    return adapter, probe
