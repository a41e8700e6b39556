"""An engine that stands beside ours: `generate` of transformers, asked in rounds."""

from bisect import bisect_left

import torch

from holdfast.engines.rounds import Said


class PlainEngine:
    """Answers rounds greedily, and knows nothing of thinking."""

    def __init__(self, adapter, *, stops_at_text=True, keeps_end=True):
        self.adapter, self.asked = adapter, []
        self.stops_at_text, self.keeps_end = stops_at_text, keeps_end

    def __call__(self, rounds):
        self.asked += rounds
        # Padded on the left, and told so, rows of a batch do not see each other.
        width = max(len(each.token_ids) for each in rounds)
        padded = [(0,) * (width - len(e.token_ids)) + e.token_ids for e in rounds]
        seen = [
            [place >= width - len(each.token_ids) for place in range(width)]
            for each in rounds
        ]
        written = self.adapter.model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(seen).long(),
            max_new_tokens=max(each.limit for each in rounds),
            do_sample=False,
            eos_token_id=sorted(self.adapter.stop_ids),
            pad_token_id=0,
        )[:, width:].tolist()
        pairs = zip(rounds, written, strict=True)
        return [self.answer(each, ids[: each.limit]) for each, ids in pairs]

    def answer(self, asked, written):
        adapter = self.adapter
        stop = next((i for i, t in enumerate(written) if t in adapter.stop_ids), None)
        if stop is not None:
            written = written[: stop + 1]
        whole = adapter.tokenizer.decode(written)
        if asked.stop and self.stops_at_text and asked.stop in whole:
            n = bisect_left(
                range(len(written)),
                True,
                key=lambda n: asked.stop in adapter.tokenizer.decode(written[:n]),
            )
            return Said(tuple(written[:n]), "stop")
        if stop is not None:
            return Said(tuple(written if self.keeps_end else written[:-1]), "stop")
        return Said(tuple(written), "length")
