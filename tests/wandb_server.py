"""A stand-in for W&B's server: answers its client well enough to take a run's history, and resumes runs as W&B does."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40
PROJECT = {"id": "p", "name": "ropewalk", "entity": {"id": "e", "name": "me"}}


class WandbServer(ThreadingHTTPServer):
    """One run's history, as rows in the order of the server's file."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """That has W&B's client log to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client breaks connections off when it is done."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_PUT(self) -> None:
        """An upload of a file."""
        self._read()
        self._answer({})

    def do_POST(self) -> None:
        body = self._read()
        if self.path.endswith("/file_stream"):
            self._append((json.loads(body).get("files") or {}).get("wandb-history.jsonl"))
            self._answer({})
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            self._answer({"data": self._data(asked.get("operationName"), asked.get("variables") or {})})
        else:
            self._answer({})

    def _append(self, part: dict[str, Any] | None) -> None:
        if part is not None:
            rows = [json.loads(line) for line in part["content"]]
            self.server.history[part["offset"] : part["offset"] + len(rows)] = rows

    def _data(self, operation: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        history = self.server.history
        run = {"id": "r", "name": variables.get("name") or "run", "displayName": "run", "config": "{}"}
        run |= {"project": PROJECT, "historyLineCount": len(history)}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": run, "inserted": not history, "initialRunSettings": None}}
        if operation == "RunResumeStatus":
            last = history[-1] if history else {}
            run |= {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "tags": [], "notes": ""}
            run |= {"summaryMetrics": json.dumps(last), "historyTail": json.dumps([json.dumps(last)])}
            run |= {"wandbConfig": '{"t": 1}'}
            return {"model": PROJECT | {"bucket": run if history else None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/file"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _read(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any]) -> None:
        reply = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: Any) -> None:
        pass
