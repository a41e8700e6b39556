"""An engine that stands beside ours: `generate` of transformers, asked in rounds."""

import torch

from holdfast.engines.rounds import Said


class PlainEngine:
    """Answers rounds greedily, one by one, and knows nothing of thinking."""

    def __init__(self, adapter, *, stops_at_text=True, keeps_end=True):
        self.adapter, self.asked = adapter, []
        self.stops_at_text, self.keeps_end = stops_at_text, keeps_end

    def __call__(self, rounds):
        self.asked += rounds
        return [self.answer(each) for each in rounds]

    def answer(self, asked):
        adapter = self.adapter
        ids = torch.tensor([asked.token_ids])
        written = adapter.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.limit,
            do_sample=False,
            eos_token_id=sorted(adapter.stop_ids),
            pad_token_id=0,
        )[0, len(asked.token_ids) :].tolist()
        if asked.stop and self.stops_at_text:
            for n in range(1, len(written) + 1):
                if asked.stop in adapter.tokenizer.decode(written[:n]):
                    return Said(tuple(written[:n]), "stop")
        if written[-1] in adapter.stop_ids:
            return Said(tuple(written if self.keeps_end else written[:-1]), "stop")
        return Said(tuple(written), "length")
