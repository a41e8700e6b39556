"""A real HTTP server that speaks like a chat model, well or badly."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
    """What the server sends: a status, headers, and a body or nothing at all."""

    def __init__(
        self, text=None, *, status=200, headers=(), body=None, drop=False, half=False
    ):
        self.status, self.headers, self.drop = status, dict(headers), drop
        self.half = half  # Whether the connection ends in the middle of the body.
        if body is None:
            message = {"role": "assistant", "content": text}
            usage = {"total_tokens": 10}
            body = json.dumps({"choices": [{"message": message}], "usage": usage})
        self.body = body.encode()


class ChatServer(ThreadingHTTPServer):
    """Answers by a function of the request's body and of how many came before."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _ChatHandler)
        self.answer, self.lock = answer, threading.Lock()
        self.bodies, self.keys, self.busy, self.busiest = [], [], 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Keep quiet: clients that give up are what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    """Sends replies, and says nothing on the terminal."""

    def respond(self, reply):
        if reply.drop:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        sent = len(reply.body) // 2 if reply.half else len(reply.body)
        self.wfile.write(reply.body[:sent])
        self.close_connection = self.close_connection or reply.half

    def log_message(self, *arguments):
        """Say nothing on the terminal."""


class _ChatHandler(Handler):
    def do_POST(self):
        server = self.server
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            reply = server.answer(body, number)
        finally:
            # Before the reply is out, for its reader may ask again at once.
            with server.lock:
                server.busy -= 1
        self.respond(reply)


@contextmanager
def running(server):
    """Let a server answer in a thread of its own, as long as the block lasts."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(answer):
    return running(ChatServer(answer))
