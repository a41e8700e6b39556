"""The connector of vLLM that keeps hidden states, on a machine without an accelerator.

It differs from vLLM's own (0.32) in the copy alone, which asks for pinned memory and a
stream of CUDA: what is written, when, and under which name is decided there.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1 import (
    example_hidden_states_connector as example,
)


class Written:
    """A copy that is done; stands for an event of CUDA."""

    def query(self) -> bool:
        """Say that it is done."""
        return True


class CpuStates(example.ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Writes states at once, from memory of the CPU."""

    def _submit_async_write(self, pending: Any) -> None:
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        offsets = torch.arange(self._block_size)
        slots = (offsets[None] + blocks[:, None] * self._block_size).flatten()
        n = len(pending.token_ids)
        states = example.extract_from_kv_cache(self._kv_cache, slots, n)
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids}
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        save_file(tensors, pending.filename)
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is not None:
            os.close(lock)
        self._req_copy_events[pending.req_id] = Written()
