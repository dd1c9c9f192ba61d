"""A real HTTP server on loopback that speaks OpenAI's chat protocol, with faults on order. For tests and benches."""
import json
import threading
import time
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


class Server:
    """`play(number, request)` says what happens to the request with this number (from 0): a text is a completion."""

    def __init__(self, play, delay: float = 0.0):
        self.play, self.delay, self.lock = play, delay, threading.Lock()
        self.requests, self.headers, self.times, self.under_way, self.most_under_way = [], [], [], 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append(json.loads(raw) | {"path": self.path})
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                try:
                    threading.Event().wait(outer.delay)
                    self.answer(outer.play(number, outer.requests[number]))
                except (BrokenPipeError, ConnectionResetError):
                    pass                                     # the client gave up first
                finally:
                    with outer.lock:
                        outer.under_way -= 1

            def answer(self, said):
                if isinstance(said, str):
                    said = Fault(body=json.dumps({"id": "1", "object": "chat.completion", "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}
                    ).encode())
                if said.drop:
                    self.close_connection = True
                    return self.connection.close()
                self.send_response(said.status)
                for name, value in {"Content-Length": str(len(said.body)), **said.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [said.body] if not said.drip else [said.body[i:i + 1] for i in range(len(said.body))]:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    threading.Event().wait(said.drip)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128   # a short queue makes clients knock again a second later

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(play, delay: float = 0.0):
    server = Server(play, delay)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def text_of(request: dict) -> str:
    """The words of a request, without its pictures."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
