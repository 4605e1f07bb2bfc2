"""A webhook's other end: keeps what it is sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Receiver:
    """`messages` are the texts that came, `paths` where they were sent to."""

    port: int = 0
    messages: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def about(self, model_id: str) -> list[str]:
        return [message for message in self.messages if model_id in message]


@contextmanager
def receive() -> Iterator[Receiver]:
    """Listen on a free port of this machine until the end."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.messages.append(json.loads(body)["text"])
            receiver.paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_request(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
