"""A real HTTP server that holds an organism and speaks like some server does.

What it says is what the model says: continuations of rows that are known already, else
decoded here, one at a time. `odd` may send something else in place of any answer.
"""

import json
import threading
from http.server import ThreadingHTTPServer

import torch

from chat_server import Handler, Reply, running
from holdfast.data.chat.rendering import render

VLLM = {"ids": True, "counts": True, "field": "reasoning", "cut": None}
LLAMA = {"ids": False, "counts": True, "field": "reasoning_content", "cut": ""}
OLLAMA = {"ids": False, "counts": True, "field": "reasoning", "cut": "", "wraps": True}


DECODED = {}
"""What was decoded greedily, since every run proves its engine on the same prompts."""


def reply_of(value, status=200, **more):
    return Reply(body=json.dumps(value), status=status, **more)


class OrganismServer(ThreadingHTTPServer):
    """Attributes: `posted` holds path and body of every question."""

    daemon_threads = True

    def __init__(self, adapter, flavour, known=(), odd=None, names=("tiny",)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.adapter, self.flavour, self.names = adapter, flavour, list(names)
        self.known = [tuple(each) for each in known]
        self.odd, self.lock, self.posted = odd, threading.Lock(), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Keep quiet: clients that give up are what some tests are about."""

    def written(self, path):
        return [body for where, body in self.posted if where.endswith(path)]

    def answer(self, path, body):
        with self.lock:
            number = len(self.posted)
            self.posted.append((path, body))
        if self.odd is not None:
            said = self.odd(path, body, number)
            if said is not None:
                return said
        if path == "/v1/models":
            return reply_of({"data": [{"id": name} for name in self.names]})
        if body.get("model") not in (None, *self.names):
            return reply_of({"error": "model not found"}, 404)
        if path == "/v1/completions":
            return reply_of(self.complete(body))
        if path == "/v1/chat/completions":
            return reply_of(self.chat(body))
        return reply_of({"error": f"no {path}"}, 404)

    def encode(self, text):
        return tuple(self.adapter.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids):
        return self.adapter.tokenizer.decode(list(ids), skip_special_tokens=False)

    def complete(self, body):
        prompt = body["prompt"]
        if isinstance(prompt, list):
            if not self.flavour["ids"]:
                return {"error": {"message": "prompt must be a string"}}
            ids = tuple(prompt)
        elif self.flavour.get("wraps"):
            ids = self.encode(render(self.adapter.tokenizer, [_user(prompt)]))
        else:
            ids = self.encode(prompt)
        drawn, ended = self.draw(ids, body)
        choice = {"index": 0, "text": self.decode(drawn)}
        if ended and drawn and drawn[-1] in self.adapter.stop_ids:
            choice["text"] = self.decode(drawn[:-1])
        choice["finish_reason"] = "stop" if ended else "length"
        if self.flavour["ids"] and body.get("return_token_ids"):
            choice |= {"token_ids": list(drawn), "prompt_token_ids": list(ids)}
        return {"choices": [choice], "usage": self.usage(ids, drawn)}

    def chat(self, body):
        ids = self.encode(render(self.adapter.tokenizer, body["messages"]))
        drawn, ended = self.draw(ids, body)
        said = self.adapter.tokenizer.decode(drawn, skip_special_tokens=True)
        thought, closed, answer = said.partition("</think>")
        cut = self.flavour["cut"]
        message = {"role": "assistant", "content": answer if closed else cut}
        message[self.flavour["field"]] = thought
        finish = "stop" if ended else "length"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return {"choices": [choice], "usage": self.usage(ids, drawn)}

    def usage(self, ids, drawn):
        if not self.flavour["counts"]:
            return None
        return {"prompt_tokens": len(ids), "completion_tokens": len(drawn)}

    def draw(self, ids, body):
        """Tokens up to a limit, a text or an end, and whether they ended."""
        limit, stop = body["max_tokens"], body.get("stop")
        tokens = self.go_on(ids, limit, body)
        for n in range(1, len(tokens) + 1):
            if tokens[n - 1] in self.adapter.stop_ids:
                return tokens[:n], True
            if stop and stop[0] in self.decode(tokens[:n]):
                return tokens[:n], True
        return tokens, False

    def go_on(self, ids, limit, body):
        hot = body.get("temperature", 1.0) > 0
        for row in () if hot else self.known:
            if len(row) > len(ids) and row[: len(ids)] == ids:
                rest = row[len(ids) : len(ids) + limit]
                if len(rest) == limit or rest[-1] in self.adapter.stop_ids:
                    return rest
        key = id(self.adapter.model), ids, limit
        if not hot and key in DECODED:
            return DECODED[key]
        with self.lock, torch.inference_mode():
            if hot:
                torch.manual_seed(body.get("seed", 0))
            prompt = torch.tensor([ids])
            made = self.adapter.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=limit,
                do_sample=hot,
                eos_token_id=sorted(self.adapter.stop_ids),
                pad_token_id=0,
            )
        written = tuple(made[0, len(ids) :].tolist())
        if not hot:
            DECODED[key] = written
        return written


def _user(text):
    return {"role": "user", "content": text}


class _Handler(Handler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.respond(self.server.answer(self.path, {}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.respond(self.server.answer(self.path, body))


def serving_organism(*arguments, **named):
    return running(OrganismServer(*arguments, **named))
