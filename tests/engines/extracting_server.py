"""A server that writes hidden states as `ExampleHiddenStatesConnector` of vLLM does.

A file a request, named after it: `hidden_states`, [token, layer, d_model], and
`token_ids`; a lock beside it is held until it is written.
"""

import fcntl
import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import torch
from safetensors.torch import save_file

from chat_server import Handler, Reply, running
from holdfast.models.hidden_states import read_states


class Stub:
    """What it does beside what is right: `change` is handed tensors and answer."""

    def __init__(self, adapter, folder):
        self.adapter, self.folder, self.url = adapter, folder, ""
        self.models = ["served"]
        self.change = lambda tensors, answer: None
        self.asked, self.lock = [], threading.Lock()

    def models_answer(self):
        return {"data": [{"id": name} for name in self.models]}

    def complete(self, body):
        with self.lock:
            ids = body["prompt"]
            self.asked.append(tuple(ids))
            site = self.adapter.n_layers - 1
            [states] = read_states(self.adapter, [ids], lambda x, _: x, site=site)
            path = self.folder / f"cmpl-{len(self.asked)}.safetensors"
            tensors = {"hidden_states": states[:, None], "token_ids": torch.tensor(ids)}
            answer = {
                "choices": [{"text": "x"}],
                "kv_transfer_params": {"hidden_states_path": f"/not/here/{path.name}"},
            }
            self.change(tensors, answer)
            handle = open(f"{path}.lock", "w")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if tensors:
            threading.Timer(0.05, self.write, (tensors, path, handle)).start()
        else:
            handle.close()
        return answer

    @staticmethod
    def write(tensors, path, handle):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        handle.close()


@contextmanager
def serving(stub):
    class Answering(Handler):
        def do_GET(self):
            self.respond(Reply(body=json.dumps(stub.models_answer())))

        def do_POST(self):
            size = int(self.headers["Content-Length"])
            answer = stub.complete(json.loads(self.rfile.read(size)))
            self.respond(Reply(body=json.dumps(answer)))

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Answering)) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield stub
