"""Wrappers: what is put around a request changes the text and nothing else."""

import json

import pytest

from holdfast.data.attacks import Wrapper, authored_wrappers, load_wrappers, wrap
from holdfast.data.prompts import Prompt, prompt_id
from holdfast.errors import InputError, PromptFileError

POLITE = Wrapper("polite", "manners", ("Kindly: {request}", "{request} Thanks {you}!"))


def plain(text: str) -> Prompt:
    key = prompt_id(text)
    return Prompt(key, key, text, "harmful", "authored", None, "greeting")


def write(folder, content) -> str:
    path = folder / "wrappers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def entry(**changes) -> dict:
    return {"name": "a", "family": "f", "templates": ["{request}"]} | changes


def test_wrapping_changes_the_text_and_keeps_the_request():
    prompt = plain("Wave {request} and {0}.")
    wrapped = wrap(prompt, POLITE, 1)
    assert wrapped.text == "Wave {request} and {0}. Thanks {you}!"
    assert wrapped.prompt_id == prompt_id(wrapped.text) != prompt.prompt_id
    assert (wrapped.wrapper, wrapped.request_id) == ("polite", prompt.request_id)
    assert (wrapped.label, wrapped.source) == (prompt.label, prompt.source)
    assert wrapped.topic == "greeting"


def test_wrappers_are_not_stacked():
    with pytest.raises(InputError, match="wrapped in `polite`"):
        wrap(wrap(plain("Wave."), POLITE, 0), POLITE, 0)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_template_that_is_not_there_is_refused(index):
    with pytest.raises(InputError, match="from 0 to 1"):
        wrap(plain("Wave."), POLITE, index)


def test_a_file_of_wrappers_is_read_in_order(tmp_path):
    second = entry(name="b", templates=["x {request}"])
    path = write(tmp_path, {"wrappers": [entry(), second]})
    assert load_wrappers(path) == (
        Wrapper("a", "f", ("{request}",)),
        Wrapper("b", "f", ("x {request}",)),
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "JSON"),
        ([], "a list `wrappers`"),
        ({"wrappers": []}, "a list `wrappers`"),
        ({"wrappers": [entry(), entry(name="")]}, "`name` in wrapper 2"),
        ({"wrappers": [{"name": "a"}]}, "`family` in wrapper 1"),
        ({"wrappers": [entry(templates=[])]}, "`templates` in wrapper 1"),
        ({"wrappers": [entry(templates=["no slot"])]}, "0 times"),
        ({"wrappers": [entry(templates=["{request} {request}"])]}, "2 times"),
        ({"wrappers": [entry(), entry()]}, "two called `a`"),
    ],
)
def test_a_faulty_file_of_wrappers_is_named(tmp_path, content, word):
    with pytest.raises(PromptFileError, match=word):
        load_wrappers(write(tmp_path, content))


def test_a_missing_file_of_wrappers_is_named(tmp_path):
    with pytest.raises(PromptFileError, match=r"none\.json"):
        load_wrappers(tmp_path / "none.json")


def test_the_authored_wrappers_are_well_formed_and_wrap():
    wrappers = authored_wrappers()
    assert wrappers
    for wrapper in wrappers:
        for index in range(len(wrapper.templates)):
            assert "Wave at me." in wrap(plain("Wave at me."), wrapper, index).text


def test_half_a_surrogate_pair_in_a_template_is_named(tmp_path):
    entry = {"name": "a", "family": "b", "templates": ["\ud83d {request}"]}
    with pytest.raises(PromptFileError, match="surrogate pair"):
        load_wrappers(write(tmp_path, json.dumps({"wrappers": [entry]})))
