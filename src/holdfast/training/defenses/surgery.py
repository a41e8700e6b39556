"""Keep heads from turning to the sink over harmful text: Surgery, and a control."""

from holdfast.training.defenses.contract import Hooks, Scene
from holdfast.training.defenses.draws import Draws
from holdfast.training.defenses.options import RandomSinkOptions, SurgeryOptions
from holdfast.training.defenses.sink_term import Texts, sink_hooks
from holdfast.training.defenses.sink_texts import chance_texts
from holdfast.training.targets import Example

CUT = 512
"""Tokens of a text in the authors' loop."""


def surgery(scene: Scene, options: SurgeryOptions) -> Hooks:
    """Add what is above 0 in the sink divergence of every head, averaged over heads.

        f(w) + weight mean_h ReLU( alpha_h(harmful; w) - alpha_h(reference; w) )

    alpha_h(x) is the mean over the tokens of x after the first of the attention that
    head h pays to the first token, its sink. Both come from the model in training.
    By default a harmful and a refusing answer to one prompt are compared over as many
    positions as the shorter has, for attention to the sink falls with the length of
    what is before a token, whatever that says.

    With `mean` above 0 the divergence is smoothed over steps: a head counts if its
    running mean is above 0, that mean is the value of the term, and the gradient is
    that of the present batch. Of a single pair, a head without any divergence is
    above 0 half of the time.

    Source:
        Surgery, https://arxiv.org/abs/2602.05228, and the authors' code, which
        `parity=true` equals: unpaired draws of one text each, cut at 512 tokens,
        any safe answer as reference (the paper says refusals), all heads, gradient
        through both texts, weight 300. Its draws are not reproduced, and neither is
        the second begin-of-text token that it puts before a templated text. The
        paper itself could not be read in full.
    """
    material = scene.material
    if options.paired:
        draws = Draws(len(material.pairs), scene.seed)

        def paired(number: int) -> Texts:
            chosen = [material.pairs[at] for at in draws.take(number, options.batch)]
            return Texts(
                [material.harmful[one] for one, _ in chosen],
                [material.reference[other] for _, other in chosen],
            )

        return sink_hooks(scene, options, paired, paired=True)
    harmful = Draws(len(material.harmful), scene.seed)
    reference = Draws(len(material.reference), scene.seed + 1)
    cut = CUT if options.parity else None

    def apart(number: int) -> Texts:
        ones = harmful.take(number, options.batch)
        others = reference.take(number, options.batch)
        return Texts(
            [_cut(material.harmful[at], cut) for at in ones],
            [_cut(material.reference[at], cut) for at in others],
        )

    return sink_hooks(scene, options, apart, paired=False)


def random_sink(scene: Scene, options: RandomSinkOptions) -> Hooks:
    """Do what `surgery` does with random tokens in place of harmful answers: a control.

        f(w) + weight mean_h ReLU( alpha_h(random; w) - alpha_h(reference; w) )

    What `surgery` gains over this it owes to harm and not to a penalty on sinks. Each
    reference row gets one random answer, of as many tokens, drawn evenly from the
    vocabulary without control tokens; prompt and thinking stay. Everything else is as
    in `surgery`, paired.

    Source:
        Control of our own (see `reference_loss`).
    """
    rows = scene.material.reference
    answers = chance_texts(rows, scene.adapter.tokenizer, scene.seed)
    draws = Draws(len(rows), scene.seed)

    def draw(number: int) -> Texts:
        places = draws.take(number, options.batch)
        return Texts([answers[at] for at in places], [rows[at] for at in places])

    return sink_hooks(scene, options, draw, paired=True)


def _cut(text: Example, most: int | None) -> Example:
    return Example(text.input_ids[:most], text.labels[:most], text.answer)
