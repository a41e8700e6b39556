"""Proofs on a dummy batch, for causal and for masked models, tier by tier."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from holdfast.errors import AdapterError
from holdfast.models.batching import Side, pad
from holdfast.models.folds import (
    folded,
    head_contributions,
    is_plain,
    worst,
    worst_deviation,
    zeroed_columns,
)
from holdfast.models.interventions import scale_heads, scale_inside
from holdfast.models.library import library_errors
from holdfast.models.model import Adapter, LanguageModel, Proof, Tier

DUMMY_LENGTHS = (11, 7)
DUMMY_SEED = 0


class Limit(NamedTuple):
    """Largest relative deviation that passes, for one kind of arithmetic."""

    one_step: float
    whole_pass: float


# One step rounds once: 2^-8 in bfloat16 and 2^-11 in float16, of the value itself.
# Through all blocks those roundings add up, and padding takes another kernel, which
# rounds elsewhere. A padding token that is attended to moves states by far more.
LIMITS = {
    torch.float32: Limit(1e-4, 1e-4),
    torch.float16: Limit(5e-3, 2e-2),
    torch.bfloat16: Limit(2e-2, 1e-1),
}


def prove(model: LanguageModel) -> tuple[Proof, ...]:
    """Check the contract of a model on two short rows of random tokens.

    Nothing of the model is changed when this returns. There is one proof for each part
    of the contract, passed or not.
    """
    rows = dummy_rows(model.embedding.num_embeddings)
    with torch.no_grad():
        if not isinstance(model, Adapter):
            return (_two_way(model, rows[0]), *_read_states(model, rows))
        return (
            *_text(model, rows),
            *_tried("states", lambda: _read_states(model, rows)),
            *_tried("heads", lambda: _heads(model, rows)),
        )


def _read_states(
    model: LanguageModel, rows: Sequence[Sequence[int]]
) -> tuple[Proof, ...]:
    padded = (_padding(model, rows, side) for side in ("left", "right"))
    return (*padded, _final_norm(model, rows), _logits(model, rows))


def _tried(tier: Tier, prove_it: Callable[[], tuple[Proof, ...]]) -> tuple[Proof, ...]:
    """Return proofs, or a failed one where the model cannot even be asked for them."""
    try:
        with library_errors(AdapterError, "a model that can be looked into", ""):
            return prove_it()
    except AdapterError as error:
        return (Proof("it can be looked into", False, None, None, error.found, tier),)


def require(proofs: Sequence[Proof], model_id: str, tier: Tier | None = None) -> None:
    """Raise if any proof failed, or any of a tier.

    `tier`: The tier that has to hold; every one by default.

    Raises:
        AdapterError: Names every proof that failed and what was measured; it
            carries all proofs.
    """
    failed = [proof for proof in proofs if not proof.passed]
    if any(tier in (None, proof.tier) for proof in failed):
        raise AdapterError(
            f"a model that keeps the contract of its family ({model_id})",
            "; ".join(proof.failure() for proof in failed),
            "The model differs from its family, or its arithmetic is not exact "
            "enough: load it in float32, and without edits by other libraries.",
            proofs,
        )


def dummy_rows(vocab: int) -> list[list[int]]:
    """Return the two short rows of random tokens, below `vocab`."""
    generator = torch.Generator().manual_seed(DUMMY_SEED)
    return [
        torch.randint(vocab, (length,), generator=generator).tolist()
        for length in DUMMY_LENGTHS
    ]


def _states(
    model: LanguageModel, rows: Sequence[Sequence[int]], side: Side = "right"
) -> list[Float[Tensor, "position d_model"]]:
    batch = pad(rows, side, model.device)
    states = model.states(batch)
    return [states[row][batch.mask[row]] for row in range(len(rows))]


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry that was expected."""
    expected = expected.to(found.device)
    difference = (found.float() - expected.float()).abs().max()
    scale = expected.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(difference / scale)


def _proof(
    name: str, value: float, limit: float, detail: str, tier: Tier = "states"
) -> Proof:
    # A comparison with NaN is false, so a model that returns NaN never passes.
    return Proof(name, value <= limit, value, limit, detail, tier)


@contextmanager
def _recorded(*points: tuple[nn.Module, str]) -> Iterator[list[Tensor]]:
    """Yield the list into which the named input or output of each module goes."""
    found: list[Tensor] = [torch.empty(0)] * len(points)

    def before(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: Any) -> None:
            found[index] = arguments[0] if arguments else named["hidden_states"]

        return hook

    def after(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for index, (module, end) in enumerate(points):
            handle = (
                module.register_forward_pre_hook(before(index), with_kwargs=True)
                if end == "input"
                else module.register_forward_hook(after(index))
            )
            stack.enter_context(handle)
        yield found


N_STEPS = 3
"""Tokens that are read one by one, behind a cache."""


def _text(adapter: Adapter, rows: Sequence[Sequence[int]]) -> tuple[Proof, Proof]:
    whole = [_all_logits(adapter, row) for row in rows]
    changed = [*rows[0][:-1], (rows[0][-1] + 1) % adapter.embedding.num_embeddings]
    limits = LIMITS[adapter.dtype]
    ahead = relative(_all_logits(adapter, changed)[:-1], whole[0][:-1])
    expected = torch.cat([logits[-N_STEPS:] for logits in whole])
    found = _decoded(adapter, rows).flatten(0, 1)
    return (
        _proof(
            "no token sees those that come after it",
            ahead,
            limits.one_step,
            "the last token is another one; logits before it, relative to the largest",
            "text",
        ),
        _proof(
            "rows side by side, read token by token behind a cache, give the logits "
            "of one row in one pass",
            float((found - expected).norm() / expected.norm()),
            limits.whole_pass,
            f"two rows, padded on the left, their last {N_STEPS} tokens; norm of the "
            "difference relative to that of the logits",
            "text",
        ),
    )


def _all_logits(
    adapter: Adapter, row: Sequence[int]
) -> Float[Tensor, "position vocab"]:
    batch = pad([row], "right", adapter.device)
    logits: Tensor = adapter.model(**batch.inputs(), use_cache=False).logits
    return logits[0].float()


def _decoded(
    adapter: Adapter, rows: Sequence[Sequence[int]]
) -> Float[Tensor, "example step vocab"]:
    """Return the logits after each of the last tokens, read as a decoder reads them."""
    batch = pad(rows, "left", adapter.device)
    positions, mask = batch.positions(), batch.mask.long()
    cache = DynamicCache(config=adapter.model.config)
    begin = batch.token_ids.shape[1] - N_STEPS
    found = []
    for start, stop in [
        (0, begin),
        *((at, at + 1) for at in range(begin, mask.shape[1])),
    ]:
        output = adapter.model(
            input_ids=batch.token_ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        found.append(output.logits[:, -1].float())
    return torch.stack(found[1:], 1)


def _sums(adapter: Adapter, rows: Sequence[Sequence[int]]) -> tuple[Proof, Proof]:
    own = adapter.layers_with_heads
    points: list[tuple[nn.Module, str]] = []
    for block in (adapter.blocks[layer] for layer in own):
        end = (block.joint, "input") if block.joint else (block.module, "output")
        parts = [(block.projection, "input"), (block.attention, "output")]
        points += [*parts, (block.module, "input"), end]
    with _recorded(*points) as found:
        _states(adapter, rows)
    heads_off = stream_off = 0.0
    for place, layer in enumerate(own):
        heads, written, entering, after = found[4 * place : 4 * place + 4]
        block, width = adapter.blocks[layer], heads.shape[-1]
        if adapter.n_heads * block.head_width != width:
            heads_off = float("inf")
            continue
        total = head_contributions(adapter, layer, heads).sum(-2)
        if block.projection.bias is not None:
            total = total + block.projection.bias.float()
        heads_off = worst(heads_off, relative(total, written))
        if not (block.has_mixer or block.parallel):
            added = block.attention_scale * folded(block, written)
            moved = entering.to(added.device).float() + added
            stream_off = worst(stream_off, relative(after, moved))
    limit = LIMITS[adapter.dtype].one_step
    return (
        _proof(
            "the contributions of the heads sum to the attention output",
            heads_off,
            limit,
            "inputs of the output projection times its columns, added in float32; "
            "a bias of the projection is counted apart; worst layer, relative to "
            "the largest entry; infinite if heads and columns are not as many",
            "heads",
        ),
        _proof(
            "the attention output is added to the residual stream as its layer says",
            stream_off,
            limit,
            "what enters the MLP minus what entered the layer, against the attention "
            "output through its norm and times its multiplier; worst layer, relative "
            "to the largest entry; where a mixer adds to it as well, the sum of all "
            "was solved",
            "heads",
        ),
    )


def _heads(adapter: Adapter, rows: Sequence[Sequence[int]]) -> tuple[Proof, ...]:
    if adapter.lacks("heads") is not None:
        return ()
    away = [
        layer
        for layer in adapter.layers_with_heads
        if adapter.output_projection(layer).weight.is_meta
    ]
    if away:
        detail = f"those of layers {away} are fetched while it runs: they did not fit"
        name = "weights of the output projections lie on a device"
        return (Proof(name, False, None, None, detail, "heads"),)
    sums = _sums(adapter, rows)
    if sums[0].value == float("inf"):
        # Nothing can be scaled by heads that are not as wide as the columns.
        return sums
    return (
        *sums,
        _norms(adapter),
        _empty_edit(adapter, rows),
        *_ablation(adapter, rows),
    )


def _norms(adapter: Adapter) -> Proof:
    after = [block.norm_after for block in adapter.blocks if block.norm_after]
    return _proof(
        "heads are folded through root-mean-square norms",
        worst_deviation((adapter.final_norm, *after), adapter),
        LIMITS[adapter.dtype].one_step,
        "the final norm and those after attention, on random vectors; relative to the "
        "largest entry; infinite if one names no epsilon",
        "heads",
    )


def _empty_edit(adapter: Adapter, rows: Sequence[Sequence[int]]) -> Proof:
    plain = _states(adapter, rows)
    factors = torch.ones((adapter.n_layers, adapter.n_heads))
    with scale_heads(adapter, factors, layers=adapter.layers_with_heads):
        edited = _states(adapter, rows)
    return _proof(
        "an edit of no head changes nothing",
        _difference(edited, plain),
        0.0,
        "every hook in place, every factor 1; bit for bit",
        "heads",
    )


def _ablation(adapter: Adapter, rows: Sequence[Sequence[int]]) -> tuple[Proof, Proof]:
    plain, own = _states(adapter, rows), adapter.layers_with_heads
    # Heads that were baked away write nothing; then others are tried.
    for first in range(adapter.n_heads):
        factors = torch.ones((adapter.n_layers, adapter.n_heads))
        for layer in own:
            factors[layer, (first + layer) % adapter.n_heads] = 0
        with scale_heads(adapter, factors):
            hooked = _states(adapter, rows)
        value = float("inf") if _difference(hooked, plain) == 0 else 0.0
        if value == 0:
            break
    packed = not all(is_plain(adapter.blocks[layer].projection) for layer in own)
    if not packed and value == 0:
        with zeroed_columns(adapter, factors):
            value = _difference(hooked, _states(adapter, rows))
    away = _proof(
        "scaling a head by 0 takes it away"
        if packed
        else "scaling a head by 0 equals zeroing its columns of the output projection",
        value,
        0.0,
        "one head in each layer; infinite if the states do not move at all"
        + (
            "; columns of packed weights are not zeroed"
            if packed
            else "; bit for bit in any arithmetic, since both ways the same kernel "
            "adds the same zeros; the columns are put back"
        ),
        "heads",
    )
    return away, _slices(adapter, rows, factors)


def _slices(
    adapter: Adapter,
    rows: Sequence[Sequence[int]],
    factors: Float[Tensor, "layer head"],
) -> Proof:
    # Both ways by the same kernel, so that nothing but the place differs.
    with scale_inside(adapter, torch.ones_like(factors)), scale_heads(adapter, factors):
        hooked = _states(adapter, rows)
    with scale_inside(adapter, factors) as asked:
        inside = _states(adapter, rows)
    every = asked == set(adapter.layers_with_heads)
    return _proof(
        "columns of the output projection are of one head alone",
        _difference(hooked, inside) if every else float("inf"),
        0.0,
        "the same heads scaled by 0 where attention returns them, before any gate or "
        "norm; infinite if a layer takes its attention from elsewhere; bit for bit",
        "heads",
    )


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def _two_way(model: LanguageModel, row: Sequence[int]) -> Proof:
    other = [*row[:-1], (row[-1] + 1) % model.embedding.num_embeddings]
    [states], [changed] = _states(model, [row]), _states(model, [other])
    # Position by position, since one of a large norm may hardly move.
    moves = (changed - states).float().norm(dim=-1) / states.float().norm(dim=-1)
    moved = float(moves[:-1].max())
    return _proof(
        "attention goes both ways",
        0.0 if moved > LIMITS[model.dtype].one_step else float("inf"),
        0.0,
        "the state of a token moves with one that comes after it; infinite if none "
        "does",
    )


def _padding(model: LanguageModel, rows: Sequence[Sequence[int]], side: Side) -> Proof:
    alone = torch.cat([_states(model, [row])[0] for row in rows]).float()
    padded = torch.cat(_states(model, rows, side)).float()
    return _proof(
        f"{side}-padded and unpadded rows give the same states",
        float((padded - alone).norm() / alone.norm()),
        LIMITS[model.dtype].whole_pass,
        "norm of the difference over all positions, relative to that of the states",
    )


def _final_norm(model: LanguageModel, rows: Sequence[Sequence[int]]) -> Proof:
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        calls.append((arguments[0], output))

    layers = model.layers if isinstance(model, Adapter) else ()
    last_block = [(layers[-1], "output")] if layers else []
    with model.final_norm.register_forward_hook(hook), _recorded(*last_block) as blocks:
        states = model.states(pad(rows[:1], "right", model.device))
    entering, leaving = calls[-1] if calls else (states, states)
    same = len(calls) == 1 and all(
        torch.equal(one, other.to(one.device))
        for one, other in [(leaving, states), *((entering, block) for block in blocks)]
    )
    takes = "takes what the last block returns, changes it"
    return _proof(
        "states are read after the final norm",
        0.0 if same and not torch.equal(entering, leaving) else float("inf"),
        0.0,
        f"the norm {takes if last_block else 'runs once, changes what it takes'}, and "
        "what it returns is the base model's last state; bit for bit",
    )


def _logits(model: LanguageModel, rows: Sequence[Sequence[int]]) -> Proof:
    batch = pad(rows[:1], "right", model.device)
    states = model.states(batch)
    if isinstance(model, Adapter):
        inputs = {**batch.inputs(), "use_cache": False, "logits_to_keep": 1}
        value = relative(model.model(**inputs).logits, model.lm_head(states[:, -1:]))
        how = "last position, relative to the largest logit"
    else:
        logits = model.model(**batch.inputs()).logits.float()
        off = model.lm_head(states).float() - logits
        value = float(off.norm() / logits.norm())
        how = "all positions, norm of the difference relative to that of the logits"
    return _proof(
        "logits are the head of the state after the final norm",
        value,
        LIMITS[model.dtype].one_step,
        how,
    )
