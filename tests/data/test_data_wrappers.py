"""Wrappers: what is put around a request changes the text and nothing else."""

import pytest

from holdfast.data.attacks import Wrapper, authored_wrappers, wrap
from holdfast.data.prompts import Prompt, prompt_id
from holdfast.errors import InputError

POLITE = Wrapper("polite", "manners", ("Kindly: {request}", "{request} Thanks {you}!"))


def plain(text: str) -> Prompt:
    key = prompt_id(text)
    return Prompt(key, key, text, "harmful", "authored", None, "greeting")


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


def test_the_authored_wrappers_are_well_formed_and_wrap():
    wrappers = authored_wrappers()
    assert len({wrapper.name for wrapper in wrappers}) == len(wrappers) > 0
    for wrapper in wrappers:
        assert wrapper.family
        assert all(template.count("{request}") == 1 for template in wrapper.templates)
        for index in range(len(wrapper.templates)):
            assert "Wave at me." in wrap(plain("Wave at me."), wrapper, index).text
