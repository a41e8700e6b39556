"""Steps of both kinds of model, held against slow loops written here.

The loops read one prompt at a time, without cache or padding, and recompute
everything at every step.
"""

from dataclasses import replace

import pytest
import torch

from holdfast.errors import InputError, SettingsError
from holdfast.models.decoding.generate import decoding_steps, generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.decoding.steps import NOTHING, Pooled, StepView
from holdfast.models.diffusion.denoise import denoise, denoising_steps
from holdfast.models.diffusion.unmasking import UnmaskingSchedule, predict
from holdfast.models.loading.causal import adapt
from holdfast.models.loading.masked import adapt_masked, load_masked
from masked_checkpoints import (
    MASK,
    dream_reference,
    llada_reference,
    write_dream,
    write_llada,
)
from tiny_models import PLAIN_TEMPLATE, random_sequences, tiny_model, tiny_tokenizer

LENGTHS = [5, 9, 3, 12]
GEN = 12


def prompts(lengths=LENGTHS):
    return [(ids, 100 + i) for i, ids in enumerate(random_sequences(lengths))]


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return load_masked(write_llada(tmp_path_factory.mktemp("llada")))


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    return load_masked(write_dream(tmp_path_factory.mktemp("dream")))


@pytest.fixture(scope="module")
def writer():
    return adapt(tiny_model("qwen3"), tiny_tokenizer(PLAIN_TEMPLATE))


def by_prompt(batches):
    traces = [drawn for batch in batches for drawn in batch]
    return sorted(traces, key=lambda drawn: drawn.index)


# A slow masked-diffusion loop after LLaDA's generate.py: one prompt, all positions.


def slow_diffusion(reference, prompt, sampler, *, shift, gen=GEN):
    start, text = len(prompt), [*prompt] + [MASK] * gen
    block = sampler.block_length or gen
    steps, rest = divmod(sampler.steps, gen // block)
    assert rest == 0
    seen = []
    for number in range(sampler.steps):
        masked = [i for i in range(start, start + gen) if text[i] == MASK]
        states, logits = reference(text)
        if sampler.cfg_scale:
            _, blind = reference([MASK] * start + text[start:])
            logits = blind + (sampler.cfg_scale + 1) * (logits - blind)
        if shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        logits = logits.double()
        logits[:, MASK] = -torch.inf
        shares = logits.softmax(-1)
        predicted = logits.argmax(-1).tolist()
        end = start + block * (number // steps + 1)
        open_here = [i for i in masked if i < end]
        sure = {i: float(rank(shares[i], sampler.remasking)) for i in open_here}
        place = number % steps
        quota = block // steps + (place < block % steps)
        fresh = sorted(open_here, key=lambda i: (-sure[i], i))[:quota]
        confidence = [
            float(shares[i, predicted[i]]) if i in masked else float("nan")
            for i in range(start, start + gen)
        ]
        shown = [
            predicted[i] if i in masked else text[i] for i in range(start, start + gen)
        ]
        for i in fresh:
            text[i] = predicted[i]
        committed = [text[i] != MASK for i in range(start, start + gen)]
        seen.append((states[start:], shown, confidence, committed, states))
    return text[start:], seen


def rank(shares, remasking):
    best = shares.sort(descending=True).values
    if remasking == "entropy":
        return (shares * shares.clamp(min=1e-300).log()).sum()
    return best[0] - best[1] if remasking == "margin" else best[0]


SAMPLERS = {
    "one block": UnmaskingSchedule(gen_length=GEN, steps=4),
    "blocks": UnmaskingSchedule(gen_length=GEN, block_length=4, steps=6),
    "uneven quotas": UnmaskingSchedule(gen_length=GEN, steps=5),
    "left to right": UnmaskingSchedule(gen_length=GEN, block_length=1, steps=GEN),
    "guidance": UnmaskingSchedule(gen_length=GEN, steps=4, cfg_scale=1.5),
    "entropy": UnmaskingSchedule(gen_length=GEN, steps=4, remasking="entropy"),
    "margin": UnmaskingSchedule(gen_length=GEN, steps=4, remasking="margin"),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_diffusion_is_the_slow_loop(family, name, request):
    masked, sampler = request.getfixturevalue(family), SAMPLERS[name]
    reference = {"llada": llada_reference, "dream": dream_reference}[family]
    traces = by_prompt(denoise(masked, prompts(), sampler, observe=lambda k: k.states))
    for drawn, (prompt, _) in zip(traces, prompts(), strict=True):
        shift = family == "dream"
        text, seen = slow_diffusion(reference, prompt, sampler, shift=shift)
        assert drawn.min_top2_gap > 1e-5
        assert drawn.min_margin > 1e-6
        assert drawn.trace.token_ids.tolist() == text
        assert drawn.trace.n_steps == len(seen) == sampler.steps
        for step, (states, shown, confidence, committed, _) in enumerate(seen):
            assert (
                drawn.trace.observed[step, : len(states)] - states
            ).abs().max() < 1e-4
            assert drawn.trace.predictions[step].tolist() == shown
            expected = torch.tensor(confidence)
            assert torch.allclose(
                drawn.trace.confidences[step], expected, atol=1e-4, equal_nan=True
            )
            assert (drawn.trace.committed_ids(step) != NOTHING).tolist() == committed


def test_left_to_right_sampling_still_attends_to_the_masks_that_follow(llada):
    sampler = SAMPLERS["left to right"]
    prompt = prompts()[0]
    [[drawn]] = denoise(llada, [prompt], sampler)
    assert drawn.trace.committed_at.tolist() == list(range(GEN))
    # With fewer masks after it, the first token is another one, or less or more sure.
    [[shorter]] = denoise(llada, [prompt], sampler_of(4))
    assert abs(float(drawn.trace.confidence[0] - shorter.trace.confidence[0])) > 1e-3


def sampler_of(length):
    return UnmaskingSchedule(gen_length=length, block_length=1, steps=length)


NOISY = {
    "noise": UnmaskingSchedule(gen_length=GEN, steps=4, temperature=0.7),
    "lots": UnmaskingSchedule(gen_length=GEN, steps=4, remasking="random"),
    "both": UnmaskingSchedule(
        gen_length=GEN, steps=4, remasking="random", temperature=1.0
    ),
    "threshold": UnmaskingSchedule(
        gen_length=GEN, steps=None, threshold=0.5, block_length=4
    ),
    "noise and guidance": UnmaskingSchedule(
        gen_length=GEN, steps=4, temperature=0.7, cfg_scale=1.0
    ),
}


@pytest.mark.parametrize("name", NOISY | SAMPLERS)
def test_the_batch_changes_nothing(llada, name):
    sampler = (NOISY | SAMPLERS)[name]
    lengths = [GEN, 8, 8, GEN] if sampler.block_length == 4 else [GEN] * 4
    pooled = [Pooled("committed"), Pooled("all_response"), Pooled("producing")]

    def observe(look):
        return torch.stack([pool(look) for pool in pooled], 1)

    alone, together = (
        by_prompt(
            denoise(
                llada,
                prompts(),
                sampler,
                batch_size=size,
                gen_lengths=lengths,
                observe=observe,
            )
        )
        for size in (1, 4)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.min_top2_gap > 1e-5
        assert one.min_margin > 1e-6
        assert torch.equal(one.trace.predictions, other.trace.predictions)
        assert torch.equal(one.trace.committed_at, other.trace.committed_at)
        assert (one.trace.observed - other.trace.observed).abs().max() < 1e-4
        assert one.answer == other.answer


def test_padding_that_is_attended_to_would_show(llada, monkeypatch):
    """The contrast to the test above: it fails where padding is seen."""
    sampler = SAMPLERS["one block"]
    [[alone]] = denoise(llada, [prompts()[0]], sampler, observe=lambda k: k.states)
    forward = llada.base.forward
    monkeypatch.setattr(
        llada.base, "forward", lambda input_ids, **_: forward(input_ids)
    )
    traces = by_prompt(denoise(llada, prompts(), sampler, observe=lambda k: k.states))
    assert (traces[0].trace.observed - alone.trace.observed).abs().max() > 1e-2


def test_guidance_shows_the_states_with_the_prompt(llada):
    prompt = prompts()[0]
    plain, guided = (
        next(
            denoising_steps(
                llada,
                [prompt],
                UnmaskingSchedule(gen_length=GEN, steps=4, cfg_scale=scale),
                observe=lambda look: look.states,
            )
        )
        for scale in (0.0, 3.0)
    )
    assert (plain.observed - guided.observed).abs().max() < 1e-4
    assert not torch.equal(plain.predicted, guided.predicted)


def test_noise_is_drawn_as_often_as_the_shares_say():
    """Gumbel noise of temperature T draws from the softmax of logits over T."""
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0, -4.0], dtype=torch.float64)
    sampler = UnmaskingSchedule(gen_length=1, steps=1, temperature=1.7)
    generator = torch.Generator().manual_seed(0)
    found = predict(logits.expand(20_000, -1), sampler, generator)
    shares = (logits / 1.7).softmax(-1)
    counts = torch.bincount(found.tokens, minlength=5).double()
    off = (counts - 20_000 * shares) / (20_000 * shares * (1 - shares)).sqrt()
    assert off.abs().max() < 4
    # How sure the model is has nothing to do with the noise.
    assert torch.equal(found.confidence, logits.softmax(-1)[found.tokens])


def test_rows_of_other_seeds_are_other_rows(llada):
    prompt = prompts()[2][0]
    rows = [(prompt, seed) for seed in range(60)]
    sampler = UnmaskingSchedule(gen_length=3, steps=3, remasking="random")
    orders = [
        tuple(drawn.trace.committed_at.tolist())
        for drawn in by_prompt(denoise(llada, rows, sampler, batch_size=60))
    ]
    assert len(set(orders)) == 6
    assert max(map(orders.count, set(orders))) < 24
    sampler = UnmaskingSchedule(gen_length=3, steps=1, temperature=3.0)
    texts = {
        tuple(drawn.trace.token_ids.tolist())
        for drawn in by_prompt(denoise(llada, rows, sampler, batch_size=60))
    }
    assert len(texts) > 50


def test_a_threshold_commits_to_what_is_above_it_and_never_to_nothing(llada):
    sampler = UnmaskingSchedule(
        gen_length=GEN, steps=None, threshold=0.1, block_length=6
    )
    steps = list(denoising_steps(llada, prompts(), sampler))
    places = {p for step in steps for p in step.places}
    assert places == set(range(4))
    for step in steps:
        for row, place in enumerate(step.places):
            fresh = step.fresh[row]
            open_now = ~step.committed[row] | fresh
            if not open_now.any():
                continue
            first = int(open_now.int().argmax()) // 6
            here = torch.arange(GEN) // 6 == first
            confidence = step.confidence[row].masked_fill(~(open_now & here), -1.0)
            expected = confidence > 0.1
            expected[int(confidence.argmax())] = True
            assert torch.equal(fresh, expected), (step.number, place)
    counts = {
        len(t.trace.confidences) for t in by_prompt(denoise(llada, prompts(), sampler))
    }
    assert len(counts) > 1
    greedy = UnmaskingSchedule(gen_length=GEN, steps=None, threshold=0.999)
    [[slow]] = denoise(llada, prompts()[:1], greedy)
    best = SAMPLERS["one block"].__class__(gen_length=GEN, steps=GEN)
    [[one]] = denoise(llada, prompts()[:1], best)
    assert torch.equal(slow.trace.committed_at, one.trace.committed_at)


# Left to right.


def slow_writing(writer, prompt, n_tokens, stops=()):
    text, states = list(prompt), []
    with torch.no_grad():
        while len(states) < n_tokens:
            hidden = writer.model.model(torch.tensor([text])).last_hidden_state[0]
            states.append(hidden)
            text.append(int(writer.model.lm_head(hidden[-1]).argmax()))
            if text[-1] in stops:
                break
    return text[len(prompt) :], states


GREEDY = Sampling(temperature=0, max_thinking=0, max_answer=10)


@pytest.fixture(scope="module")
def stops(writer):
    said = [slow_writing(writer, ids, 10)[0] for ids, _ in prompts()]
    return [said[0][4], said[2][7]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_left_to_right_steps_are_the_slow_loop(writer, stops, batch_size):
    observed = {"states": lambda k: k.states[:, 0]}
    observed |= {p: Pooled(p) for p in ("producing", "committed")}
    for name, observe in observed.items():
        traces = by_prompt(
            generate(
                writer,
                prompts(),
                GREEDY,
                batch_size=batch_size,
                stop_ids=stops,
                observe=observe,
            )
        )
        for drawn, (prompt, _) in zip(traces, prompts(), strict=True):
            said, hidden = slow_writing(writer, prompt, 10, stops)
            assert drawn.min_top2_gap > 1e-4
            assert drawn.trace.token_ids.tolist() == said
            for step, states in enumerate(hidden):
                expected = states[-1]
                if name == "producing":
                    expected = states[len(prompt) - 1 :].mean(0)
                elif name == "committed" and step:
                    expected = states[len(prompt) :].mean(0)
                assert (drawn.trace.observed[step] - expected).abs().max() < 1e-4
                assert drawn.trace.draft(step)[: step + 1].tolist() == said[: step + 1]
                assert (drawn.trace.draft(step)[step + 1 :] == NOTHING).all()
                with torch.no_grad():
                    sure = float(writer.model.lm_head(states[-1]).softmax(-1).max())
                assert abs(float(drawn.trace.confidence[step]) - sure) < 1e-4


def test_traces_hold_what_generate_returns(writer, stops):
    sampling = Sampling(temperature=0.9, max_thinking=0, max_answer=10)
    plain = [
        c
        for batch in generate(writer, prompts(), sampling, stop_ids=stops)
        for c in batch
    ]
    traces = [
        t
        for batch in generate(
            writer, prompts(), sampling, stop_ids=stops, observe=Pooled("committed")
        )
        for t in batch
    ]
    # Prompts are read one length at a time where nobody looks on, which rounds anew.
    for one, other in zip(by_prompt([traces]), by_prompt([plain]), strict=True):
        assert one.min_margin == pytest.approx(other.min_margin, abs=1e-6)
        gap = pytest.approx(other.min_top2_gap, abs=1e-4)
        assert one.min_top2_gap == gap
        same = {"min_margin": 0.0, "min_top2_gap": 0.0}
        assert replace(one, **same) == replace(other, **same)


def test_steps_come_one_by_one_and_end_with_the_rows(writer, stops):
    steps = list(decoding_steps(writer, prompts(), GREEDY, stop_ids=stops))
    assert [step.number for step in steps] == list(range(len(steps)))
    traces = by_prompt(
        generate(writer, prompts(), GREEDY, stop_ids=stops, observe=Pooled("committed"))
    )
    assert len(steps) == max(drawn.trace.n_steps for drawn in traces)
    for step in steps:
        for row, place in enumerate(step.places):
            drawn = traces[place]
            ids = step.committed_ids[row]
            expected = drawn.trace.committed_ids(step.number)
            assert (
                ids[ids != NOTHING].tolist() == expected[expected != NOTHING].tolist()
            )
            assert bool(step.fresh[row].any()) == (step.number < drawn.trace.n_steps)
    first = decoding_steps(writer, prompts(), GREEDY, stop_ids=stops)
    assert next(first).number == 0


def test_the_answer_alone_can_be_pooled():
    thinker = adapt(tiny_model("qwen3"), tiny_tokenizer())
    sampling = Sampling(temperature=0, max_thinking=4, max_answer=6)
    for name in ("producing", "committed"):
        both = [Pooled(name), Pooled(name, "answer")]
        raw = by_prompt(
            generate(thinker, prompts(), sampling, observe=lambda k: k.states[:, 0])
        )
        traces = by_prompt(
            generate(
                thinker,
                prompts(),
                sampling,
                observe=lambda k, both=both: torch.stack([pool(k) for pool in both], 1),
            )
        )
        for drawn, single in zip(traces, raw, strict=True):
            start = drawn.spans.answer[0] - drawn.spans.prompt[1]
            assert drawn.forced_close
            assert start > 4
            assert drawn.trace.observed[:start, 1].isnan().all()
            states, answer = single.trace.observed, drawn.trace.observed[start:, 1]
            for step in range(len(answer)):
                first = start + (name == "committed" and step > 0)
                expected = states[first : start + step + 1].mean(0)
                assert (answer[step] - expected).abs().max() < 1e-4
            assert not torch.allclose(
                drawn.trace.observed[-1, 0], drawn.trace.observed[-1, 1]
            )


# Pooling, in closed form.


def test_pooling_in_closed_form():
    states = torch.arange(24.0).reshape(2, 3, 4)
    committed = torch.tensor([[True, False, True], [False, True, False]])
    real = torch.tensor([[True, True, True], [True, True, False]])

    def look(step, fresh):
        return StepView(
            kind="diffusion",
            step=step,
            rows=torch.arange(2),
            states=states,
            producing=states + 100,
            real=real,
            committed=committed,
            fresh=fresh,
            answering=torch.ones(2, dtype=torch.bool),
        )

    expected = torch.stack([states[0, [0, 2]].mean(0), states[1, 1]])
    assert torch.equal(Pooled("committed")(look(0, committed)), expected)
    expected = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
    assert torch.equal(Pooled("all_response")(look(0, committed)), expected)
    pool = Pooled("producing")
    first = torch.tensor([[True, False, False], [False, True, False]])
    second = torch.tensor([[False, False, True], [False, False, False]])
    found = pool(look(0, first))
    assert torch.equal(found, torch.stack([states[0, 0], states[1, 1]]) + 100)
    found = pool(look(1, second))
    expected = torch.stack([states[0, [0, 2]].mean(0), states[1, 1]]) + 100
    assert torch.equal(found, expected)
    # A new batch begins at step 0, and nothing of the last one is left.
    assert torch.equal(pool(look(0, second))[0], states[0, 2] + 100)


def test_masked_positions_do_not_exist_left_to_right(writer):
    with pytest.raises(SettingsError, match="`committed` or `producing`"):
        list(generate(writer, prompts(), GREEDY, observe=Pooled("all_response")))


# What a response is, and what is refused.


def test_a_response_is_cut_at_its_stop_token():
    model = tiny_model("qwen3", is_causal=False, mask_token_id=MASK)
    masked = adapt_masked(model, tiny_tokenizer(PLAIN_TEMPLATE))
    sampler = UnmaskingSchedule(gen_length=GEN, steps=4)
    [[free]] = denoise(masked, prompts()[:1], sampler)
    assert free.finish == "length"
    with torch.no_grad():
        # The stop token is now what the third predicted token was.
        wanted = int(free.trace.token_ids[2])
        rows = model.lm_head.weight[[wanted, 257]].clone()
        model.lm_head.weight[[257, wanted]] = rows
    [[cut]] = denoise(masked, prompts()[:1], sampler)
    assert cut.trace.token_ids[2] == 257
    completion = cut
    assert completion.finish == "stop"
    assert len(completion.token_ids) == LENGTHS[0] + 3
    assert completion.spans.answer == (LENGTHS[0], LENGTHS[0] + 2)
    kept = masked.tokenizer.decode(cut.trace.token_ids[:2], skip_special_tokens=True)
    assert completion.answer == kept
    assert len(cut.trace.token_ids) == GEN


def test_the_mask_is_never_predicted(llada):
    weight = llada.model.lm_head.weight
    [[before]] = denoise(llada, prompts()[:1], SAMPLERS["one block"])
    favourite = int(before.trace.predictions[0, 0])
    kept = weight[MASK].clone()
    with torch.no_grad():
        weight[MASK] = 2 * weight[favourite]
        try:
            [[drawn]] = denoise(llada, prompts()[:1], SAMPLERS["one block"])
        finally:
            weight[MASK] = kept
    assert torch.equal(drawn.trace.predictions, before.trace.predictions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, "multiple of the block length, 4"),
        ({"gen_length": 8, "block_length": 4, "steps": 5}, "multiple of the 2 blocks"),
        ({"gen_length": 8, "steps": 9}, "at most 8"),
        ({"gen_length": 8, "steps": 0}, "1 or more steps"),
        ({"gen_length": 8, "steps": None}, "or a threshold"),
        ({"gen_length": 8, "steps": 4, "threshold": 0.9}, "no number of steps"),
        (
            {"gen_length": 8, "steps": None, "threshold": 0.9, "remasking": "random"},
            "low_confidence remasking",
        ),
        ({"gen_length": 8, "steps": 4, "temperature": -1}, "temperature of 0"),
        ({"gen_length": 8, "steps": 4, "cfg_scale": -1}, "guidance scale"),
        ({"gen_length": 0, "steps": 4}, "response of 1"),
        ({"gen_length": 8, "block_length": 0, "steps": 4}, "block of 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        UnmaskingSchedule(**settings)


def test_lengths_and_prompts_that_do_not_fit_are_refused(llada):
    sampler = SAMPLERS["blocks"]
    with pytest.raises(SettingsError, match="multiple of the block length"):
        denoise(llada, prompts()[:1], sampler, gen_lengths=[10])
    with pytest.raises(SettingsError, match="one length for each of 1 prompts"):
        denoise(llada, prompts()[:1], sampler, gen_lengths=[4, 4])
    for prompt in ([], [1] * 250):
        with pytest.raises(InputError, match="prompts of 1 to 244 tokens"):
            denoise(llada, [(prompt, 0)], sampler)
    assert list(denoising_steps(llada, [], sampler)) == []
    with pytest.raises(SettingsError, match="one entry for each of 1 rows"):
        list(denoise(llada, prompts()[:1], sampler, observe=lambda k: k.states[0, 0]))
