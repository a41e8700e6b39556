"""Random models of real shapes in the little world, whose answers were written before.

A random model refuses nothing. Its rows are planted: answers of the little world are
read in as completions that were made elsewhere.
"""

import json

import tiny_thinker
from tiny_models import tiny_model, tiny_of_every_kind


def smollm2(**changes):
    """The shape of SmolLM2-135M: Llama with nine heads over three of keys, tied."""
    return tiny_model(
        "llama",
        attention_bias=False,
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
        **changes,
    )


def elsewhere(folder, shape):
    """Write a model of a shape and completions; return the words for `rollout`."""
    tokenizer = tiny_thinker.tokenizer()
    made = {"vocab_size": len(tokenizer)}
    model = smollm2(**made) if shape == "smollm2" else tiny_of_every_kind(shape, **made)
    place, path = folder / "model", folder / "made.jsonl"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    write_completions(path)
    return [str(place), "--import", str(path)]


def write_completions(path):
    """Completions of the little world, two samples of some prompts among them."""
    lines = []
    for place, request in enumerate(tiny_thinker.requests(tiny_thinker.HARM, 60)):
        for wrapper in (None, "song"):
            prompt, thought, answer = tiny_thinker.scene(request, wrapper, True)
            answers = [answer]
            if wrapper == "song" and place % 3 == 0:
                answers.append(tiny_thinker.REFUSAL)
            for said in answers:
                lines.append((prompt, thought, said, "harmful", wrapper, request))
    for request in tiny_thinker.requests(tiny_thinker.CARE, 60):
        scene = tiny_thinker.scene(request, None, False)
        lines.append((*scene, "benign", None, request))
    keys = ("prompt", "completion", "label", "wrapper", "request_id")
    path.write_text(
        "\n".join(
            json.dumps(
                dict(zip(keys, (p, f"{t}\n</think>\n\n{a}", *rest), strict=True))
            )
            for p, t, a, *rest in lines
        )
    )
