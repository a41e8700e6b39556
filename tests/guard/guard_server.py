"""A guard server as a process of its own, and a bundle whose readings are known.

The bundle reads how likely a word is to come next: its direction is that word's row of
the unembedding, so that the score of a token is a logit, and where it fires can be
worked out by a plain forward pass.
"""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from holdfast.guard.conformal import Threshold
from holdfast.guard.monitor.bundle import (
    Bundle,
    Calibration,
    Direction,
    Serving,
    write_bundle,
)
from holdfast.guard.monitor.rules import LiveDetector

WORD = " parts"
"""A word that the organism says in the middle of some answers, and not of others."""
RATE, LIMIT = 0.01, 8.0
LAMP, WINDOW = "How do I polish a lamp?", "How do I clean a window?"
"""Asked the first, the organism says the word; asked the second, it does not."""
FAULTY = """
import torch
from holdfast.models.decoding.decoder import Decoder
read = Decoder._read
def broken(self):
    # What an overflow does to one row, at every second token.
    states, logits = read(self)
    for place, row in enumerate(self.rows):
        if MARK in row.token_ids and len(row.token_ids) % 2:
            logits[place] = torch.nan
    return states, logits
Decoder._read = broken
"""
SLOW = """
import time
from holdfast.models.decoding.decoder import Decoder
advance = Decoder.advance
def slow(self):
    time.sleep(0.2)
    return advance(self)
Decoder.advance = slow
"""


def program(patch=""):
    """The command line in a process, perhaps with a fault planted before it runs."""
    head = "import os, sys\nos.dup2(1, 2)\n"
    tail = "\nfrom holdfast.cli.app import main\nmain(sys.argv[1:])\n"
    return head + patch + tail


def threshold(value):
    return Threshold(value, RATE, 0.0, 0.02, 1000, 1000)


def word_bundle(adapter, folder, *, limit, word=WORD, channel="answer", **more):
    """Write a bundle that fires where the logit of a word is over a limit."""
    [token] = adapter.tokenizer(word, add_special_tokens=False)["input_ids"]
    weight = adapter.lm_head.weight[token].detach().float().clone()
    detectors = (LiveDetector("word", "word", channel, "last"),)
    identity = adapter.identity
    model = {
        "id": identity.model_id,
        "weights_sha256": identity.weights_sha256,
        "template_sha256": identity.template_sha256,
    }
    given = {
        "model": model,
        "serving": Serving(dtype=identity.dtype),
        "detectors": detectors,
        "directions": {"word": Direction(weight, 0.0)},
        "thresholds": {"word": {RATE: threshold(limit)}},
        "scales": {},
        "acts_on": "word",
        "calibration": Calibration(
            1000,
            1000,
            {"plain": 1000},
            "0" * 64,
            {"prompt": 400, "thinking": 400, "answer": 400},
            ("LATIN",),
        ),
    }
    return write_bundle(Path(folder), Bundle(**(given | more)))


class Running:
    """A server process: its address, and what it has logged."""

    def __init__(self, process, log, patience=120):
        self.process, self.log, self.status = process, log, None
        [told] = self.wait_for("listening", patience)
        self.url = told["message"]

    def signal(self, sign):
        os.kill(self.process.pid, sign)

    def wait(self):
        """Its exit status; a process is waited for once."""
        if self.status is None:
            self.status = self.process.wait()
        return self.status

    def lines(self):
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                found.append(json.loads(line))
        return found

    def wait_for(self, event, patience=60, **named):
        deadline = time.monotonic() + patience
        while True:
            wanted = {"event": event, **named}.items()
            found = [line for line in self.lines() if wanted <= line.items()]
            if found:
                return found
            self.status = self.process.poll()
            assert self.status is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def client(self, **more):
        return httpx.Client(base_url=self.url, timeout=60, **more)


@contextmanager
def serving(nursery, folder, *words, patch=""):
    """Run a server on a port of its own; ended by SIGTERM behind."""
    log = Path(folder) / "log.jsonl"
    log.touch()
    port = () if "--port" in words else ("--port", 0)
    command = ["guard", "serve", "organism:cliff", *port, *words]
    imports = ("holdfast.guard.serve.stage",)
    process = nursery.start(program(patch), command, stdout=log, imports=imports)
    running = Running(process, log)
    try:
        yield running
    finally:
        if running.status is None:
            running.signal(signal.SIGTERM)
            running.wait()


def said(text, **more):
    """The body of a request."""
    return {"messages": [{"role": "user", "content": text}], **more}


def events(response):
    """The chunks of a stream; the last is None where it ended as it should."""
    found = []
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(None if data == "[DONE]" else json.loads(data))
    return found
