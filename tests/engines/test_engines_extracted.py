import json

import pyarrow.parquet as pq
import pytest
import torch
from extracting_server import Stub, serving

import pool_fixture
from holdfast.cli.app import run
from holdfast.engines.reading import extracted
from holdfast.engines.reading.extracted import Extracted
from holdfast.engines.reading.parity import compare, local_reader
from holdfast.errors import EndpointError, InputError, ModelError
from holdfast.models.hidden_states import read_states

pytest.importorskip("httpx")
TEXTS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16, 17], [20, 21, 20]]


@pytest.fixture(scope="module")
def made(thinker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extracted")
    adapter, probe = pool_fixture.write_study(thinker, folder / "study")
    pool_fixture.write_pool(folder / "pool.jsonl", 6)
    return folder, adapter, probe


@pytest.fixture
def stub(made, tmp_path):
    with serving(Stub(made[1], tmp_path)) as served:
        yield served


def reading(stub):
    return Extracted(stub.url, str(stub.folder), stub.adapter)


def test_states_are_those_of_the_model_and_the_files_are_gone(stub):
    found = list(reading(stub).all_states(TEXTS))
    expected = read_states(stub.adapter, TEXTS, lambda states, _: states)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not list(stub.folder.iterdir())
    assert sorted(stub.asked) == sorted(map(tuple, TEXTS))
    parity = compare(local_reader(stub.adapter, 2), reading(stub).reader(), TEXTS)
    assert parity.apart < 1e-5


def test_states_of_half_precision_come_back_in_float32(stub):
    def change(tensors, answer):
        tensors["hidden_states"] = tensors["hidden_states"].bfloat16()

    stub.change = change
    [states] = reading(stub).all_states(TEXTS[:1])
    [expected] = read_states(stub.adapter, TEXTS[:1], lambda states, _: states)
    assert states.dtype == torch.float32
    assert 0 < float((states - expected).norm() / expected.norm()) < 0.01


def zeros(tensors, answer):
    tensors["hidden_states"][1:] = 0


def cached(tensors, answer):
    for key in tensors:
        tensors[key] = tensors[key][2:]


def others(tensors, answer):
    tensors["token_ids"][0] += 1


def flat(tensors, answer):
    tensors["hidden_states"] = tensors["hidden_states"][:, 0]


def narrow(tensors, answer):
    tensors["hidden_states"] = tensors["hidden_states"][..., :-1]


def infinite(tensors, answer):
    tensors["hidden_states"][0] = float("inf")


def unnamed(tensors, answer):
    tensors["states"] = tensors.pop("hidden_states")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (zeros, "4 that are all zero"),
        (cached, "found 3 of them"),
        (others, "5 of them, others"),
        (flat, "found .5, "),
        (narrow, "wide"),
        (infinite, "no numbers"),
        (unnamed, "found states, token_ids"),
    ],
)
def test_states_that_are_none_are_refused(stub, change, said):
    stub.change = change
    with pytest.raises(ModelError, match=said):
        list(reading(stub).all_states(TEXTS[:1]))


def test_states_behind_the_norm_are_refused_by_the_comparison(stub, monkeypatch):
    def normed(tensors, answer):
        with torch.inference_mode():
            done = stub.adapter.final_norm(tensors["hidden_states"]) + 0
        tensors["hidden_states"] = done.clone()

    stub.change = normed
    # The norm of this small model has learned little: twice is nearly once.
    weight = stub.adapter.final_norm.weight
    scales = torch.linspace(0.5, 2, len(weight))
    monkeypatch.setattr(weight, "data", weight.data * scales)
    with pytest.raises(ModelError, match="further apart"):
        compare(local_reader(stub.adapter, 2), reading(stub).reader(), TEXTS)


def test_answers_without_states_are_named(stub, monkeypatch):
    stub.change = lambda tensors, answer: answer.pop("kv_transfer_params")
    with pytest.raises(EndpointError, match="without hidden_states_path"):
        list(reading(stub).all_states(TEXTS[:1]))
    # The server says where a file lies, and is not believed beyond its name.
    stub.change = lambda tensors, answer: (
        tensors.clear(),
        answer.update(kv_transfer_params={"hidden_states_path": "/etc/hostname"}),
    )
    with pytest.raises(EndpointError, match=f"{stub.folder}/hostname"):
        list(reading(stub).all_states(TEXTS[:1]))
    stub.change = lambda tensors, answer: answer.update(error={"message": "no room"})
    with pytest.raises(EndpointError, match="no room"):
        list(reading(stub).all_states(TEXTS[:1]))
    monkeypatch.setattr(extracted, "TIMEOUT", 0.1)
    held = []
    stub.change, stub.write = (
        lambda tensors, answer: None,
        lambda *given: held.append(given),
    )
    with pytest.raises(EndpointError, match="still locked"):
        list(reading(stub).all_states(TEXTS[:1]))
    held[0][-1].close()


def test_two_models_and_no_folder_are_named(stub):
    with pytest.raises(InputError, match="no folder at"):
        Extracted(stub.url, str(stub.folder / "none"), stub.adapter)
    stub.models = ["a", "b"]
    with pytest.raises(InputError, match="a, b"):
        reading(stub)


def test_rows_are_scored_by_extracted_states_as_by_the_model(thinker, made, stub):
    folder = made[0]

    def select(name, *flags):
        output = stub.folder.parent / f"{name}.jsonl"
        words = ["select", str(thinker), "--pool", str(folder / "pool.jsonl")]
        words += ["--direction", str(folder / "study"), "--budget", "6"]
        words += ["--device", "cpu", "--similar", "0", *flags, "-o", str(output)]
        table = output.with_suffix(".selection.parquet")
        return run(words), table, output.with_suffix(".selection.json")

    status, ours, _ = select("local")
    assert status == 0
    flags = ("--states", stub.url, "--states-folder", str(stub.folder))
    status, theirs, record = select("served", *flags)
    assert status == 0
    [crew] = json.loads(record.read_text())["readers"]
    [parity] = crew["by"].values()
    assert (parity["n_texts"], parity["flipped"]) == (18, 0)
    pairs = zip(
        *(pq.read_table(each).to_pylist() for each in (ours, theirs)), strict=True
    )
    for a, b in pairs:
        assert (a["row"], a["left_out"]) == (b["row"], b["left_out"])
        assert a["final_logit"] == pytest.approx(b["final_logit"], abs=1e-3)
    stub.change = zeros
    assert select("zeros", *flags)[0] == 3
    assert select("half", *flags[:2])[0] == 2
    assert select("loss", *flags, "--by", "loss")[0] == 2
