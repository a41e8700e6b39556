"""Hidden states that vLLM has extracted, made into what the model itself would give.

`vllm serve` with the speculative method `extract_hidden_states` and a connector that
keeps them writes a file for each request: its token ids, and the residual stream where
it was told, `[token, layer, d_model]`. Behind the last layer, whose number is that of
all layers, it is what enters the final norm, which is applied here.

Source: `ExampleHiddenStatesConnector` of vLLM 0.32.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from holdfast.engines.http import Again, HttpClient, Reach, require_url
from holdfast.engines.reading.parity import Reader, Reading
from holdfast.errors import EndpointError, InputError, ModelError
from holdfast.models.model import Adapter
from holdfast.study.files import try_lock

CONCURRENCY, ATTEMPTS, TIMEOUT = 32, 6, 600.0
KEY_ENV = "OPENAI_API_KEY"
STATES, TOKENS = "hidden_states", "token_ids"
WAIT = 0.02
"""Seconds between two looks for a file that is being written."""


class Extracted:
    """A vLLM server that writes states, and the model that says what they mean."""

    def __init__(self, url: str, folder: str, adapter: Adapter) -> None:
        """Find out which model is served.

        Args:
            url: Address of the server, up to the version.
            folder: Where its files are seen from here; no other file is touched.
            adapter: The model, whose final norm is applied.

        Raises:
            EndpointError: If the server does not answer.
            InputError: If the folder is none, or more than one model is served.
        """
        require_url(url, KEY_ENV)
        self._folder, self._adapter = Path(folder).expanduser(), adapter
        if not self._folder.is_dir():
            raise InputError(
                "--states-folder with the folder that vLLM writes states to",
                f"no folder at {folder}",
                "Name its shared_storage_path, as it is seen from here.",
            )
        reach = Reach(url, KEY_ENV, CONCURRENCY, TIMEOUT, ATTEMPTS)
        self._client = HttpClient(reach)
        served = [each["id"] for each in self._ask("/models", None, "0")["data"]]
        if len(served) != 1:
            raise InputError(
                "a server of one model", ", ".join(served) or "none", "Serve this one."
            )
        self._model = served[0]

    def states(self, token_ids: Sequence[int]) -> Float[Tensor, "position d_model"]:
        """Return the states of a text after the final norm, in float32 on the CPU."""
        body = {"model": self._model, "prompt": list(token_ids), "max_tokens": 1}
        body["temperature"] = 0
        # Spreads the waits of many questions; it is no identity.
        key = f"{hash(tuple(token_ids)) & 0xFFFFFFFF:08x}"
        told = self._ask("/completions", body, key).get("kv_transfer_params") or {}
        name = told.get("hidden_states_path")
        if not isinstance(name, str):
            raise EndpointError(
                "a vLLM that extracts hidden states and says where they lie",
                f"an answer without hidden_states_path: {str(told)[:80]}",
                "Serve it as docs/scale.md says, with extract_hidden_states and a "
                "connector that keeps them.",
            )
        # Only the name is taken from the server: it names no file of another folder.
        return states_of(self._folder / Path(name).name, token_ids, self._adapter)

    def all_states(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield the states of many texts in their order."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            yield from pool.map(self.states, sequences)

    def project(
        self, sequences: Sequence[Sequence[int]], direction: Tensor, offset: float
    ) -> list[Float[Tensor, "position"]]:
        """Return `states @ direction + offset` of every position of every text."""
        direction = direction.float()
        return [states @ direction + offset for states in self.all_states(sequences)]

    def reader(self) -> Reader:
        """Return it as a reader, to be compared with another."""

        def read(
            sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
        ) -> Iterator[Reading]:
            found = zip(sequences, positions, self.all_states(sequences), strict=True)
            for ids, kept, states in found:
                yield Reading(tuple(ids), states[list(kept)])

        return read

    def _ask(self, path: str, body: Any, key: str) -> dict[str, Any]:
        what, kept = f"an answer of {self._client.url}", "what is finished is kept."

        def ask() -> Any:
            response = self._client.send(path, body)
            if isinstance(response, Again):
                return response
            try:
                found = response.json() if response.status_code == 200 else None
            except ValueError:
                found = None
            if not isinstance(found, dict) or "error" in found:
                raise EndpointError(
                    what,
                    f"status {response.status_code}: {self._client.words(response)}",
                    f"See that the server is right, then run it again: {kept}",
                )
            return found

        found: dict[str, Any] = self._client.insist(ask, key, what, kept)
        return found


def states_of(
    path: Path, token_ids: Sequence[int], adapter: Adapter
) -> Float[Tensor, "position d_model"]:
    """Read the states of a text from the file that vLLM wrote, and take the file away.

    Returns: After the final norm, in float32 on the CPU.

    Raises:
        EndpointError: If the file is not there, not whole, or not finished in time.
        ModelError: If it is of other tokens, or its states are none: of another shape,
            not finite, or zero, as a buffer is that was never filled.
    """
    tensors = _load(path)
    states, ids = tensors.get(STATES), tensors.get(TOKENS)
    if states is None or ids is None:
        found = ", ".join(sorted(tensors)) or "no tensor"
        raise _refused(f"{STATES} and {TOKENS} in {path.name}", found)
    if ids.tolist() != list(token_ids):
        # Fewer where a common beginning was taken from the cache of prefixes.
        raise _refused(
            f"the {len(token_ids)} tokens that were asked for in {path.name}",
            f"{len(ids)} of them" + ("" if len(ids) != len(token_ids) else ", others"),
        )
    expected = (len(token_ids), adapter.d_model)
    if states.ndim != 3 or (states.shape[0], states.shape[-1]) != expected:
        shape = tuple(states.shape)
        wanted = f"states of {expected[0]} tokens, {expected[1]} wide"
        raise _refused(wanted, f"{shape}")
    last = states[:, -1].float()
    if not torch.isfinite(last).all():
        raise _refused("finite states", "some that are no numbers")
    if not last.any(-1).all():
        n = int((~last.any(-1)).sum())
        raise _refused("states of every token", f"{n} that are all zero")
    norm = adapter.final_norm
    weight = next(norm.parameters(), None)
    with torch.inference_mode():
        # In the arithmetic of the model, as the norm has it elsewhere.
        given = states[:, -1] if weight is None else states[:, -1].to(weight)
        normed: Tensor = norm(given).float().cpu()
    return normed.clone()


def _load(path: Path) -> dict[str, Tensor]:
    """Read a file once its writer lets go of the lock beside it."""
    lock, deadline = path.with_name(f"{path.name}.lock"), time.monotonic() + TIMEOUT
    try:
        # The server makes the lock before it names the file.
        while lock.exists():
            with lock.open("rb") as handle:
                if try_lock(handle):
                    break
            if time.monotonic() > deadline:
                raise _not_there(path, f"one still locked after {TIMEOUT:.0f} s")
            time.sleep(WAIT)
        tensors: dict[str, Tensor] = load(path.read_bytes())
        path.unlink()
        lock.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise _not_there(path, f"{type(error).__name__}: {error}") from error
    return tensors


def _not_there(path: Path, found: str) -> EndpointError:
    return EndpointError(
        f"whole states of vLLM at {path}",
        found,
        "Name its shared_storage_path, as it is seen from here, with --states-folder.",
    )


def _refused(expected: str, found: str) -> ModelError:
    return ModelError(
        f"{expected}, of vLLM",
        found,
        "Serve with prefix caching and chunked prefill off, the last layer's number as "
        "the only layer id, and a version that fills the states of this model.",
    )
