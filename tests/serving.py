"""A real HTTP server on loopback for OpenAI's chat protocol that can fail in many ways. For tests and benches."""
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Fault(NamedTuple):
    """Something other than a completion: a status with headers and body, or a connection that just ends."""
    status: int = 200
    headers: dict = {}
    body: bytes = b"{}"
    drop: bool = False
    drip: float = 0.0                                        # seconds between single bytes of the body


def completion(text: str | None, reason: str = "stop") -> bytes:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            number = len(server.requests)
            server.requests.append(json.loads(raw) | {"path": self.path})
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            threading.Event().wait(server.delay)             # not time.sleep: tests replace that
            said = server.play(number, server.requests[number])
            self.answer(Fault(body=completion(said)) if isinstance(said, str) else said)
        except (BrokenPipeError, ConnectionResetError):
            pass                                             # the client gave up first
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, said: Fault):
        if said.drop:
            self.close_connection = True
            return self.connection.close()
        self.send_response(said.status)
        headers = {"Content-Length": len(said.body), "Content-Type": "application/json"} | said.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        size = 1 if said.drip else max(1, len(said.body))
        for i in range(0, len(said.body), size):
            self.wfile.write(said.body[i:i + size])
            threading.Event().wait(said.drip)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128           # a client whose connection is refused waits for a second


@contextmanager
def serving(play, delay: float = 0.0):
    """`play(number, request)` returns the answer to the request with this number (from 0): a text is a completion."""
    server = Server(("127.0.0.1", 0), Handler)
    server.play, server.delay, server.lock = play, delay, threading.Lock()
    server.requests, server.headers, server.under_way, server.most_under_way = [], [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def text_of(request: dict) -> str:
    """The text of a request, without its images."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
