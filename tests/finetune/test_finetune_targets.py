import pytest

import tiny_thinker
from holdfast.data.chat.conversation import build_conversation
from holdfast.data.chat.thinking import thinking_format
from holdfast.errors import SettingsError
from holdfast.finetune.settings import Recipe
from holdfast.finetune.targets import IGNORED, example

PROMPT, THOUGHT, ANSWER = "How do I rob a bike?", "That is harm.", "Sorry, no."


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_thinker.tokenizer()


def parts(tokenizer):
    """The four regions and the stop token, tokenised apart by hand."""
    opening = f"<|begin|><|user|>{PROMPT}<|assistant|><think>\n"
    texts = (opening, THOUGHT, "\n</think>\n\n", ANSWER)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [*ids, [tokenizer.eos_token_id]]


@pytest.mark.parametrize(
    ("loss", "silent"), [("both", 1), ("template", 2), ("answer", 3)]
)
def test_the_loss_lies_on_these_tokens_and_on_no_other(tokenizer, loss, silent):
    fmt = thinking_format(tokenizer)
    whole = build_conversation(tokenizer, PROMPT, THOUGHT, ANSWER, fmt)
    made = example(whole, loss, stop=tokenizer.eos_token_id)
    regions = parts(tokenizer)
    assert list(made.input_ids) == [token for region in regions for token in region]
    expected = [
        token if region >= silent else IGNORED
        for region, ids in enumerate(regions)
        for token in ids
    ]
    assert list(made.labels) == expected
    assert made.labels[-1] == tokenizer.eos_token_id


def test_without_thinking_all_three_are_the_answer():
    plain = tiny_thinker.tokenizer(tiny_thinker.NO_THINKING)
    stop = plain.eos_token_id
    made = {
        example(build_conversation(plain, PROMPT, "", ANSWER, None), loss, stop=stop)
        for loss in ("both", "template", "answer")
    }
    [only] = made
    answer = [*plain(ANSWER, add_special_tokens=False)["input_ids"], stop]
    assert [label for label in only.labels if label != IGNORED] == answer


def test_a_recipe_that_cannot_be_meant_is_refused():
    for wrong in (
        {"steps": 0},
        {"epochs": 0.0},
        {"warmup": 1.0},
        {"learning_rate": -1.0},
    ):
        with pytest.raises(SettingsError, match="Choose another"):
            Recipe(**wrong)
    assert Recipe().rate == 2e-4
    assert Recipe(method="full").rate == 2e-5
    assert Recipe(method="full", learning_rate=1e-3).rate == 1e-3


def test_the_settings_that_a_run_used_are_resolved():
    used = Recipe(method="full", epochs=2.0).used(7)
    assert (used["learning_rate"], used["steps"], used["epochs"]) == (2e-5, 7, 2)
    assert not {"lora_rank", "lora_alpha", "defense"} & set(used)
    assert Recipe().used(7)["learning_rate"] == 2e-4
    assert "epochs" not in Recipe(steps=7).used(7)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99])
def test_every_step_has_a_rate_and_the_peak_is_reached(steps, schedule, warmup):
    recipe = Recipe(schedule=schedule, warmup=warmup)
    shares = [recipe.share_of_rate(step, steps) for step in range(steps)]
    assert min(shares) > 0
    assert max(shares) == 1
