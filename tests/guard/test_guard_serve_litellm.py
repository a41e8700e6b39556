"""LiteLLM's own client of guardrails against the server, over a socket.

Runs where LiteLLM is installed: beside the tests, or in an environment of its own,
whose interpreter the variable `HOLDFAST_LITELLM_PYTHON` names.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from guard_server import LAMP, WINDOW, said, serving

PYTHON = os.environ.get("HOLDFAST_LITELLM_PYTHON")
if PYTHON is None and find_spec("litellm") is not None:
    PYTHON = sys.executable
pytestmark = pytest.mark.skipif(PYTHON is None, reason="LiteLLM is not installed")
KEY = "a-key-of-thirty-two-characters-1"
CLIENT = """
import asyncio, json, sys, types
from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import (
    GenericGuardrailAPI,
)

given = json.load(sys.stdin)


async def call(key, name, kind, **inputs):
    guard = GenericGuardrailAPI(
        api_base=given["url"], api_key=key, guardrail_name="holdfast"
    )
    about = types.SimpleNamespace(litellm_call_id=name, litellm_trace_id="trace")
    about.model_call_details = {}
    try:
        found = await guard.apply_guardrail(inputs, {}, kind, about)
    except Exception as error:
        return ["refused", str(error)]
    return ["passed", found.get("texts")]


async def main():
    told = []
    for name, (chat, answer) in given["calls"].items():
        texts = [each["content"] for each in chat]
        told.append(
            await call(
                given["key"], name, "request", texts=texts, structured_messages=chat
            )
        )
        told.append(await call(given["key"], name, "response", texts=[answer]))
    told.append(await call("wrong", name, "response", texts=[answer]))
    print(json.dumps(told))


asyncio.run(main())
"""


def test_litellm_blocks_what_the_guard_flags_and_passes_the_rest(
    nursery, word_guard, known, tmp_path
):
    flagged, fine = known(LAMP).answer, known(WINDOW).answer
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with serving(
        nursery, tmp_path, "--guard", word_guard, "--key-file", keys
    ) as server:
        calls = {
            "call-1": [said(LAMP)["messages"], flagged],
            "call-2": [said(WINDOW)["messages"], fine],
        }
        given = {"url": server.url, "key": KEY, "calls": calls}
        assert PYTHON is not None
        done = subprocess.run(
            [PYTHON, "-c", CLIENT],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )
    first, blocked, second, passed, wrong = json.loads(done.stdout.splitlines()[-1])
    assert first[0] == second[0] == "passed"
    assert blocked[0] == "refused"
    assert "fired at token" in blocked[1]
    assert passed == ["passed", [fine]]
    assert wrong[0] == "refused"
    assert "401" in wrong[1]
