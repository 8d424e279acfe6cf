"""A judge of flesh: an OpenAI-compatible HTTP server on this machine, in a thread, that answers as a test says."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any, dict[str, str]]
"""Status, JSON (or bytes as they are), headers."""


class LocalJudge:
    """What the server was asked, and how it answers."""

    def __init__(self, choose: Callable[[str, str, str], str] | None = None, models: tuple[str, ...] = ("tiny-judge",)):
        """`choose` gets the conversation and both responses, and says "A", "B", "C" or any other reply."""
        self.choose, self.models = choose or (lambda asked, a, b: "C"), models
        self.first: list[Answer] = []
        """Answers to the first questions, in place of verdicts."""
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.address = ""
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        """Most questions at a time."""

    def answer(self, body: dict[str, Any], key: str | None) -> Answer:
        with self._lock:
            self.asked.append(body)
            self.keys.append(key)
            if self.first:
                return self.first.pop(0)
        told = body["messages"][-1]["content"]
        parts = [
            re.search(f"<{tag}>\n(.*?)\n</{tag}>", told, re.S) for tag in ("conversation", "response A", "response B")
        ]
        said = self.choose(*[part.group(1) for part in parts])
        said = f"Here is why. [[{said}]]" if said in ("A", "B", "C") else said
        return 200, {"choices": [{"message": {"role": "assistant", "content": said}}]}, {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        yield
        with self._lock:
            self._now -= 1


def handler(judge: LocalJudge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": name} for name in judge.models]}
            self._send(*((200, listed, {}) if self.path == "/v1/models" else (404, {"error": "no such path"}, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": "no such path"}, {})
                return
            with judge.counted():
                found = judge.answer(body, self.headers.get("Authorization"))
            self._send(*found)

        def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(judge: LocalJudge) -> Iterator[LocalJudge]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(judge))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    judge.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
