"""The sink mass of every text under one model, in batches that survive a kill."""

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from holdfast.models.sink_reading import read_sinks
from holdfast.session.batches import ROW_ID, in_batches
from holdfast.session.context import Session
from holdfast.session.sink_texts import Text, Texts
from holdfast.study import Study, fingerprint

SCHEMA = pa.schema(
    [
        (ROW_ID, pa.string()),
        ("mass", pa.list_(pa.float32())),
        ("seen", pa.list_(pa.int32())),
    ]
)


def measure_texts(
    study: Study, parts: str, session: Session, texts: Texts, label: str
) -> tuple[Tensor, Tensor]:
    """Return the sink mass of every text; each distinct one is read once.

    So a text that stands on both sides has the very same mass on both.

    Args:
        study: Where batches lie until the stage has finished.
        parts: Name under which they lie.
        session: The model.
        texts: Harmful and reference texts.
        label: What the bar says.

    Returns:
        Mass of the harmful and of the reference texts, `[example, layer, head]`; not a
        number in a layer where no query of the text sees the sink.
    """
    adapter = session.adapter
    distinct = {_name(text): text for text in (*texts.harmful, *texts.reference)}

    def work(batch: list[Text]) -> pa.Table:
        found = read_sinks(
            adapter,
            [text.token_ids for text in batch],
            [text.start for text in batch],
            batch_size=session.batch_size,
        )
        columns = {
            ROW_ID: [_name(text) for text in batch],
            "mass": found.mass.flatten(1).tolist(),
            "seen": found.seen.tolist(),
        }
        return pa.table(columns, schema=SCHEMA)

    table = in_batches(
        study,
        parts,
        list(distinct.values()),
        name=_name,
        length=lambda text: len(text.token_ids),
        batch_size=session.batch_size,
        work=work,
        progress=session.progress,
        label=label,
    )
    shape = (adapter.n_layers, adapter.n_heads)
    by_name = {
        row[ROW_ID]: _mass(row["mass"], row["seen"], shape) for row in table.to_pylist()
    }
    return _stack(texts.harmful, by_name), _stack(texts.reference, by_name)


def _mass(mass: list[float], seen: list[int], shape: tuple[int, int]) -> Tensor:
    found = torch.tensor(mass, dtype=torch.float64).reshape(shape)
    return found.masked_fill((torch.tensor(seen) == 0)[:, None], torch.nan)


def _stack(texts: Sequence[Text], by_name: dict[str, Tensor]) -> Tensor:
    return torch.stack([by_name[_name(text)] for text in texts])


def _name(text: Text) -> str:
    return fingerprint([text.token_ids, text.start])[:32]
