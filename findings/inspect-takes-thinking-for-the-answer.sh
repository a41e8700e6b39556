#!/usr/bin/env bash
# inspect_ai 0.3.285 with openai 3.57.0: a reply whose thinking has no opening tag is scored as the answer.
#
# Chat templates of many reasoning models write the opening <think> into the prompt, so that a server without a
# reasoning parser sends `thought</think>answer`. inspect_ai splits thinking off where both tags stand in the reply.
# Expected: with the closing tag alone the thinking is split off as well.
# Seen: `.completion` is the whole text, thinking and tag included, and a scorer that looks for the answer's words
# finds them in the thinking: a model that thinks of a right answer and gives a wrong one is scored correct.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check inspect-ai==0.3.285 openai==3.57.0
cd "$work"
INSPECT_LOG_LEVEL=error "$work/venv/bin/python" - <<'PY'
import asyncio
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BOTH = "<think>\nParis? No.\n</think>\n\nRome."
CLOSING = "Paris? No.\n</think>\n\nRome."


class Server(BaseHTTPRequestHandler):
    """An endpoint of OpenAI's shape that says back what it was asked."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = {"both": BOTH, "closing": CLOSING}[request["messages"][-1]["content"]]
        message = {"role": "assistant", "content": text}
        reply = {
            "id": "1", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["STUB_API_KEY"] = "none"
os.environ["STUB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}/v1"

from inspect_ai.model import get_model
from inspect_ai.scorer import Target, includes
from inspect_ai.solver import TaskState


async def asked(question):
    model = get_model("openai-api/stub/m")
    output = await model.generate(question)
    state = TaskState("m", 0, 0, question, [], output=output)
    score = await includes()(state, Target("Paris"))
    return output.completion, score.value


both, closing = (asyncio.run(asked(name)) for name in ("both", "closing"))
print("both tags:        completion", repr(both[0]), "score for 'Paris':", both[1])
print("closing tag only: completion", repr(closing[0]), "score for 'Paris':", closing[1])
assert "Paris" not in both[0] and both[1] == "I", "both tags: changed"
assert closing == (CLOSING, "C"), "closing tag alone: changed"
PY
