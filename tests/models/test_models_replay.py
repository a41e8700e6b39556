"""Steps run once more, held against the decoding that took them."""

import pytest
import torch

from holdfast.errors import InputError
from holdfast.models.diffusion.denoise import denoise
from holdfast.models.diffusion.replay import Script, replay
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.loading.load import load_language_model
from holdfast.models.loading.masked import load_masked
from masked_checkpoints import write_dream, write_llada
from tiny_models import random_sequences

LENGTHS, GEN = [5, 9, 3, 12], 12
SAMPLERS = {
    "one block": UnmaskingSchedule(gen_length=GEN, steps=4),
    "left to right": UnmaskingSchedule(gen_length=GEN, block_length=1, steps=GEN),
    "random": UnmaskingSchedule(
        gen_length=GEN, steps=6, remasking="random", temperature=0.7
    ),
    "guidance": UnmaskingSchedule(gen_length=GEN, steps=4, cfg_scale=1.5),
    "threshold": UnmaskingSchedule(gen_length=GEN, steps=None, threshold=0.02),
}


@pytest.fixture(scope="module", params=["llada", "dream"])
def masked(request, tmp_path_factory):
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    return load_masked(write(tmp_path_factory.mktemp(request.param)))


def seen(look):
    """All of a look, in one tensor an example."""
    parts = (look.states, look.producing)
    marks = (look.committed, look.fresh)
    columns = [*parts, *(mark[..., None].float() for mark in marks)]
    return torch.cat(columns, -1) * look.real[..., None]


def decoded(masked, sampler, gen_lengths=None):
    prompts = [(ids, 7 + i) for i, ids in enumerate(random_sequences(LENGTHS))]
    batches = denoise(masked, prompts, sampler, gen_lengths=gen_lengths, observe=seen)
    traces = [drawn for batch in batches for drawn in batch]
    return prompts, sorted(traces, key=lambda drawn: drawn.index)


def scripts_of(prompts, traces):
    return [
        Script(
            tuple(ids),
            tuple(drawn.trace.token_ids.tolist()),
            tuple(drawn.trace.committed_at.tolist()),
        )
        for (ids, _), drawn in zip(prompts, traces, strict=True)
    ]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_states_are_those_of_the_decoding(masked, name, batch_size):
    prompts, traces = decoded(masked, SAMPLERS[name])
    scripts = scripts_of(prompts, traces)
    found = replay(masked, scripts, lambda: seen, batch_size=batch_size)
    for drawn, again in zip(traces, found, strict=True):
        assert again.shape == drawn.trace.observed.shape
        torch.testing.assert_close(again, drawn.trace.observed, atol=1e-4, rtol=0)


def test_responses_of_other_lengths_and_order_change_nothing(masked):
    sampler = UnmaskingSchedule(
        gen_length=GEN, block_length=4, steps=None, threshold=0.02
    )
    prompts, traces = decoded(masked, sampler, gen_lengths=[4, 12, 8, 12])
    scripts = scripts_of(prompts, traces)
    ahead = replay(masked, scripts, lambda: seen)
    back = replay(masked, scripts[::-1], lambda: seen, batch_size=2)[::-1]
    for drawn, one, other in zip(traces, ahead, back, strict=True):
        n = len(drawn.trace.token_ids)
        for again in (one, other):
            torch.testing.assert_close(
                again[:, :n], drawn.trace.observed[:, :n], atol=1e-4, rtol=0
            )


def test_another_order_of_writing_has_other_states(masked):
    prompts, traces = decoded(masked, SAMPLERS["one block"])
    [script, *_] = scripts_of(prompts, traces)
    turned = script._replace(committed_at=script.committed_at[::-1])
    [one], [other] = (replay(masked, [each], lambda: seen) for each in (script, turned))
    assert float((one[-1] - other[-1]).abs().max()) > 1e-2


def test_parts_that_do_not_fit_together_are_refused(masked):
    with pytest.raises(InputError, match="3, 2 and 1 of them in response 0"):
        replay(masked, [Script((1, 2, 3), (4, 5), (0,))], lambda: seen)
    with pytest.raises(InputError, match="within 256 tokens"):
        replay(masked, [Script((1,), (4,) * 256, (0,) * 256)], lambda: seen)


def test_a_model_is_loaded_as_its_configuration_says(tmp_path, saved):
    assert type(load_language_model(write_llada(tmp_path))).__name__ == "MaskedModel"
    assert type(load_language_model(saved)).__name__ == "Adapter"
