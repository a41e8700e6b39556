"""Processes that can be killed and cost little: children of one that imported all.

A fresh interpreter takes seconds to import torch and transformers; a child of the
nursery has them. The nursery runs nothing itself, so that it has no thread that a
child would miss.
"""

import json
import os
import subprocess
import sys

LOOP = """
import importlib, json, os, sys
import torch

torch.set_num_threads(1)


def start(code, words, stdout, imports):
    for name in imports:
        importlib.import_module(name)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, os.devnull, os.O_WRONLY),
        ):
            os.dup2(os.open(path, flags), number)
        sys.argv = ["-c", *words]
        exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(child, options):
    found, status = os.waitpid(child, options)
    return os.waitstatus_to_exitcode(status) if found else None


for line in sys.stdin:
    verb, arguments = json.loads(line)
    told = {"start": start, "wait": wait}[verb](*arguments)
    print(json.dumps(told), flush=True)
"""
IMPORTS = (
    "holdfast.audit.stage",
    "holdfast.cli.app",
    "holdfast.select.stage",
    "holdfast.sinks.stage",
)


class Nursery:
    """Starts pieces of Python as processes of their own."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )

    def ask(self, verb, *arguments):
        self.process.stdin.write(json.dumps([verb, arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code, words, stdout=os.devnull, imports=()):
        """Run code in a child with words as its arguments; returns at once."""
        words, wanted = list(map(str, words)), [*IMPORTS, *imports]
        return Child(self, self.ask("start", code, words, str(stdout), wanted))

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)


class Child:
    """A child of the nursery, with what `Popen` has of it."""

    def __init__(self, nursery, pid):
        self.nursery, self.pid = nursery, pid

    def poll(self):
        """Return its status, negative for a signal, or None while it runs."""
        return self.nursery.ask("wait", self.pid, os.WNOHANG)

    def wait(self):
        return self.nursery.ask("wait", self.pid, 0)
