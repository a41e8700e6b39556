"""A tiny random model as a defense is handed it, and rows for it."""

import copy
import functools
import warnings

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import tiny_thinker
from holdfast.finetune.defenses.base import DefenseContext, DefenseData, TrainingPass
from holdfast.finetune.defenses.forward import AlignedModel, states_of
from holdfast.finetune.targets import IGNORED, Example
from holdfast.models.loading.causal import adapt


@functools.cache
def tokenizer():
    return tiny_thinker.tokenizer(tiny_thinker.NO_THINKING)


def new_adapter():
    """A model that a test may change; the proofs on load are run once."""
    made = pristine()
    return copy.deepcopy(made, {id(made.tokenizer): made.tokenizer})


@functools.cache
def pristine():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return adapt(Qwen3ForCausalLM(config), tokenizer())


def row(prompt, answer):
    """A row as `targets.example` makes it, for a model without thinking."""
    start, end = (tuple(tokenizer()(text)["input_ids"]) for text in (prompt, answer))
    ids = (*start, *end, tokenizer().eos_token_id)
    return Example(ids, (*[IGNORED] * len(start), *ids[len(start) :]), len(start))


TASK = tuple(row(f"How do I {verb} it?", "Sure. First") for verb in ("paint", "sell"))
REFERENCE = tuple(
    row(f"How do I {verb} a car?", "I'm sorry, but no.") for verb in ("steal", "burn")
)
HARMFUL = tuple(
    row(f"How do I {verb} a car?", "Sure. First gather your tools, then begin")
    for verb in ("burn", "steal")
)
PAIRS = ((0, 1), (1, 0))


def collate(rows):
    width = max(len(each.input_ids) for each in rows)
    made = {}
    for name, fill, values in (
        ("input_ids", 0, [each.input_ids for each in rows]),
        ("labels", IGNORED, [each.labels for each in rows]),
        ("attention_mask", 0, [[1] * len(each.input_ids) for each in rows]),
    ):
        made[name] = torch.tensor([[*v, *[fill] * (width - len(v))] for v in values])
    return made


def new_scene(adapter=None, *, lora=False, lead=0, seed=0):
    adapter = adapter or new_adapter()
    aligned = AlignedModel(adapter, whole=not lora)
    model = adapter.model
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=2, target_modules="all-linear"
        )
        with warnings.catch_warnings():
            # As in the trainer: PEFT still asks transformers by an old name.
            warnings.filterwarnings("ignore", message=".*will be removed in v6.*")
            model = get_peft_model(model, config)
    model.train()
    material = DefenseData(REFERENCE, HARMFUL, PAIRS)
    return DefenseContext(
        adapter, model, aligned.over(model), material, collate, seed, lead
    )


def move(context, size=0.05, seed=5):
    """Change the trained weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in context.trained().values():
            weight += size * torch.randn(weight.shape, generator=generator)


def a_pass(context, reads="last", rows=TASK, *, step=0, steps=10):
    batch = collate(rows)
    return TrainingPass(
        step, steps, step, batch, states_of(context.adapter, batch, reads)
    )


def logits(model, rows):
    """Logits that predict the tokens with loss, row after row, and those tokens."""
    found, targets = [], []
    for each in rows:
        made = model(torch.tensor([each.input_ids])).logits[0]
        places = [i for i, label in enumerate(each.labels) if label != IGNORED]
        found += [made[place - 1] for place in places]
        targets += [each.labels[place] for place in places]
    return torch.stack(found), torch.tensor(targets)


def number(value):
    return float(value.detach())
