import pytest
import torch

from holdfast.errors import InputError
from holdfast.models.decoding import generate as decoding_generate
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.jobs import longest_prompt
from holdfast.models.decoding.row_state import Sampling, sample_token
from holdfast.models.loading.causal import adapt
from tiny_models import PLAIN_TEMPLATE, random_sequences, tiny_model, tiny_tokenizer

LENGTHS = [5, 12, 3, 20, 7, 7, 16, 9, 4, 11, 1]
GREEDY = Sampling(temperature=0, max_thinking=12, max_answer=12)
DRAWN = Sampling(temperature=0.8, max_thinking=12, max_answer=12)


def _prompts(lengths=LENGTHS):
    return [(ids, 100 + i) for i, ids in enumerate(random_sequences(lengths))]


def _complete(adapter, prompts, sampling, batch_size=32, **named):
    batches = generate(adapter, prompts, sampling, batch_size=batch_size, **named)
    found = [completion for batch in batches for completion in batch]
    return sorted(found, key=lambda completion: completion.index)


@pytest.fixture(scope="module")
def plain():
    """A model without thinking: nothing is forced, so transformers can be matched."""
    return adapt(tiny_model("qwen3"), tiny_tokenizer(PLAIN_TEMPLATE))


@pytest.fixture(scope="module")
def stops(plain):
    """Tokens that the model does emit, at different steps in different rows."""
    free = _complete(plain, _prompts(), GREEDY, stop_ids=[999])
    return sorted({c.token_ids[-1 - i] for i, c in enumerate(free)})[:4]


def _reference(adapter, prompt, stops, n_tokens):
    with torch.no_grad():
        found = adapter.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=n_tokens,
            eos_token_id=stops,
            pad_token_id=0,
        )
    return tuple(found[0].tolist())


def test_greedy_rows_are_those_of_transformers(plain, stops):
    prompts = _prompts()
    for batch_size in (1, 11):
        for completion in _complete(plain, prompts, GREEDY, batch_size, stop_ids=stops):
            assert completion.min_top2_gap > 1e-4
            prompt = prompts[completion.index][0]
            expected = _reference(plain, prompt, stops, GREEDY.max_answer)
            assert completion.token_ids == expected


def test_a_sliding_window_is_kept_while_decoding():
    adapter = adapt(tiny_model("mistral"), tiny_tokenizer(PLAIN_TEMPLATE))
    prompts = _prompts()
    for completion in _complete(adapter, prompts, GREEDY, stop_ids=[999]):
        prompt = prompts[completion.index][0]
        assert completion.token_ids == _reference(
            adapter, prompt, [999], GREEDY.max_answer
        )


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_do_not_depend_on_the_plan_of_batches(qwen3, stops, top_p):
    sampling = Sampling(temperature=0.8, top_p=top_p, max_thinking=12, max_answer=12)
    prompts = _prompts(LENGTHS * 3)
    plans = [
        _complete(qwen3, prompts, sampling, size, stop_ids=stops) for size in (1, 7, 32)
    ]
    clear = [i for i, row in enumerate(plans[0]) if row.min_margin > 1e-6]
    assert len(clear) > 0.9 * len(prompts)
    for plan in plans[1:]:
        for i in clear:
            assert plan[i].token_ids == plans[0][i].token_ids
            assert plan[i].spans == plans[0][i].spans
    assert {row.finish for row in plans[0]} == {"stop", "length"}


def test_another_seed_draws_another_row(qwen3):
    prompt = random_sequences([8])[0]
    rows = _complete(qwen3, [(prompt, 1), (prompt, 2), (prompt, 1)], DRAWN)
    assert rows[0].token_ids == rows[2].token_ids
    assert rows[0].token_ids != rows[1].token_ids


def test_thinking_past_its_limit_is_closed_by_force(qwen3):
    sampling = Sampling(temperature=0, max_thinking=5, max_answer=4)
    for row in _complete(qwen3, _prompts(), sampling, stop_ids=[999]):
        template = qwen3.tokenizer("\n</think>\n\n", add_special_tokens=False)
        start, end = row.spans.end_template
        assert list(row.token_ids[start:end]) == template["input_ids"]
        assert row.spans.thinking[1] - row.spans.thinking[0] == 5
        assert row.spans.answer[1] - row.spans.answer[0] == 4
        assert row.forced_close
        assert row.finish == "length"


def test_what_follows_a_forced_template_is_what_the_model_says_there(qwen3):
    sampling = Sampling(temperature=0, max_thinking=5, max_answer=6)
    (row,) = _complete(qwen3, _prompts([9]), sampling, stop_ids=[999])
    answer = row.spans.answer[0]
    expected = _reference(qwen3, list(row.token_ids[:answer]), [999], 6)
    assert row.token_ids == expected


def test_the_batch_is_halved_when_memory_ends(qwen3, monkeypatch):
    prompts = _prompts()
    expected = _complete(qwen3, prompts, DRAWN, 4)
    sizes = []

    def narrow(adapter, rules, jobs, *others):
        *_, width, _ = others
        sizes.append((len(jobs), width))
        if width > 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(adapter, rules, jobs, *others)

    decode = decoding_generate._decode
    monkeypatch.setattr(decoding_generate, "_decode", narrow)
    found = _complete(qwen3, prompts, DRAWN, 8)
    # Rows that wait take no room; those side by side are halved until they fit.
    assert sizes == [(11, 8), (11, 4), (11, 2)]
    sizes.clear()
    found[:8] = _complete(qwen3, prompts[:8], DRAWN, 8)
    assert sizes == [(8, 8), (4, 4), *[(2, 2)] * 4]
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]


def test_stop_tokens_come_from_generation_config_and_tokenizer(qwen3, monkeypatch):
    config = qwen3.model.generation_config
    monkeypatch.setattr(config, "eos_token_id", [3, 4])
    assert qwen3.stop_ids == {3, 4, qwen3.tokenizer.eos_token_id}
    monkeypatch.setattr(config, "eos_token_id", 5)
    assert qwen3.stop_ids == {5, qwen3.tokenizer.eos_token_id}


def test_a_prompt_given_as_text_is_tokenised_as_it_is(qwen3):
    text = "<|user|>hi<|end|><|assistant|><think>\n"
    ids = qwen3.tokenizer(text, add_special_tokens=False)["input_ids"]
    by_text, by_ids = _complete(qwen3, [(text, 1), (ids, 1)], GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.spans.prompt == (0, len(ids))


@pytest.mark.parametrize("length", [0, 500])
def test_a_prompt_that_leaves_no_room_is_named_at_once(qwen3, length):
    prompts = [([1, 2], 0), (random_sequences([length])[0], 0)]
    with pytest.raises(InputError, match=f"{length} tokens in prompt 1"):
        generate(qwen3, prompts, GREEDY)


def test_a_model_that_nothing_stops_is_refused(qwen3):
    with pytest.raises(InputError, match="a token that ends an answer"):
        generate(qwen3, _prompts(), GREEDY, stop_ids=[])


def test_a_model_without_a_tokenizer_cannot_generate():
    adapter = adapt(tiny_model(), None)
    with pytest.raises(InputError, match="a tokenizer to read prompts"):
        generate(adapter, _prompts(), GREEDY)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    n = 4000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sampling = Sampling(temperature=0.5, max_thinking=0, max_answer=1)
    chosen = sample_token(logits.expand(n, 4), uniforms, sampling)
    shares = chosen.tokens.bincount(minlength=4) / n
    expected = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=1 / n, rtol=0)
    assert float(chosen.gaps[0]) == 1.0


def test_a_nucleus_keeps_the_fewest_tokens_that_hold_the_mass():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    n = 1000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sampling = Sampling(temperature=1, top_p=0.7, max_thinking=0, max_answer=1)
    chosen = sample_token(probabilities.log().expand(n, 4), uniforms, sampling)
    shares = chosen.tokens.bincount(minlength=4) / n
    expected = torch.tensor([0, 2 / 3, 0, 1 / 3])
    torch.testing.assert_close(shares, expected, atol=2 / n, rtol=0)


def test_the_margin_is_the_distance_to_another_tokens_share():
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(4, 3)
    uniforms = torch.tensor([0.0, 0.26, 0.7, 0.999], dtype=torch.float64)
    sampling = Sampling(temperature=1, max_thinking=0, max_answer=1)
    chosen = sample_token(logits, uniforms, sampling)
    assert chosen.tokens.tolist() == [0, 1, 1, 2]
    expected = torch.tensor([0.25, 0.01, 0.05, 0.249], dtype=torch.float64)
    torch.testing.assert_close(chosen.margins, expected, atol=1e-7, rtol=0)


def test_a_number_next_to_one_never_draws_a_token_without_share():
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    chosen = sample_token(logits, nearly_one, DRAWN)
    assert chosen.tokens.tolist() == [1]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_long_neighbour_takes_nothing_from_a_row(qwen3, sampling):
    short = _prompts(LENGTHS[:4])
    room = qwen3.max_positions - longest_prompt(qwen3, sampling)
    long = random_sequences([longest_prompt(qwen3, sampling) - 2])[0]
    alone = _complete(qwen3, short, sampling, stop_ids=[999])
    *beside, last = _complete(qwen3, [*short, (long, 7)], sampling, stop_ids=[999])
    assert [row.token_ids for row in beside] == [row.token_ids for row in alone]
    assert [row.spans.thinking[1] - row.spans.thinking[0] for row in beside] == [12] * 4
    # Its own prompt leaves it three tokens of thinking, and the whole of its answer.
    assert last.spans.thinking == (len(long), len(long) + 3)
    assert last.forced_close
    assert last.spans.answer[1] - last.spans.answer[0] == 12
    assert len(last.token_ids) == len(long) + room + 2 == qwen3.max_positions


def test_a_row_with_less_room_is_the_same_alone_and_in_every_batch(qwen3):
    lengths = [longest_prompt(qwen3, DRAWN) - spare for spare in (0, 2, 5)]
    prompts = [*_prompts(), *((ids, 9) for ids in random_sequences(lengths))]
    plans = [_complete(qwen3, prompts, DRAWN, size) for size in (1, 3, 32)]
    for row, *others in zip(*plans, strict=True):
        if row.min_margin > 1e-6:
            assert all(other.token_ids == row.token_ids for other in others)


def test_an_answer_that_fits_behind_no_prompt_is_refused(qwen3):
    sampling = Sampling(temperature=0, max_thinking=1, max_answer=10_000)
    with pytest.raises(InputError, match="a limit of 10000 tokens"):
        generate(qwen3, _prompts(), sampling)
