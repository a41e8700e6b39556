"""A real kill of a training run, after a checkpoint and before the end."""

import os
import signal
import time

SLOW = """
import sys, time
from holdfast.finetune import trainer
from holdfast.cli.app import run
real = trainer.Defended.log
def slow(self, *arguments):
    # Long enough for the kill to come before the end.
    time.sleep(0.5 if self.state.global_step > 8 else 0)
    return real(self, *arguments)
trainer.Defended.log = slow
run(sys.argv[1:])
"""


def kill_after(nursery, checkpoint, words):
    """Run a command in a process of its own, and kill it once a checkpoint is good."""
    process = nursery.start(SLOW, words, imports=("holdfast.finetune.trainer", "trl"))
    deadline = time.monotonic() + 600
    while not (checkpoint / "holdfast.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
