"""An engine that a test plays: it lists the functions that the test chooses, and records what it is asked."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

LIST = "engine::functions::list"

Answer = Callable[[dict[str, Any]], Any]
"""Takes the input of a call; returns its result. Raises Refusal."""


class Refusal(Exception):
    """An error that is answered: code, message."""


class PlayedEngine:
    """Serves one port until it is closed."""

    def __init__(self, functions: dict[str, list[str]] | Refusal | Any) -> None:
        """`functions`: id -> the fields of its input; or what `engine::functions::list` answers."""
        self.functions = functions
        self.answers: dict[str, Answer] = {
            "state::set": lambda data: {"old_value": None, "new_value": data["value"]},
            "state::get": lambda data: 5,
            "state::list_groups": lambda data: {"groups": []},
        }
        self.calls: list[str] = []
        """Ids of the functions that were called."""
        self.payloads: list[dict[str, Any]] = []
        self._connections: list[ServerConnection] = []
        self._server: Server = serve(self._converse, "127.0.0.1", 0, compression=None)
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="test-played-engine", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Drop every connection."""
        for connection in self._connections:
            connection.socket.close()

    def close(self) -> None:
        self._server.shutdown()
        for connection in self._connections:
            connection.close()
        self._thread.join()

    def _converse(self, connection: ServerConnection) -> None:
        self._connections.append(connection)
        connection.send(json.dumps({"type": "workerregistered", "worker_id": str(uuid.uuid4())}))
        try:
            for message in connection:
                frame = json.loads(message)
                if frame["type"] == "invokefunction" and frame.get("invocation_id"):
                    connection.send(json.dumps(self._answer(frame)))
        except (ConnectionClosed, OSError):
            pass

    def _answer(self, frame: dict[str, Any]) -> dict[str, Any]:
        function_id = frame["function_id"]
        self.calls.append(function_id)
        self.payloads.append(frame["data"])
        answer = {"type": "invocationresult", "invocation_id": frame["invocation_id"], "function_id": function_id}
        try:
            if function_id == LIST:
                return {**answer, "result": self._listed()}
            if function_id not in self.answers:
                raise Refusal("function_not_found", f"Function {function_id} not found")
            return {**answer, "result": self.answers[function_id](frame["data"])}
        except Refusal as refusal:
            code, message = refusal.args
            return {**answer, "error": {"code": code, "message": message}}

    def _listed(self) -> Any:
        if isinstance(self.functions, Refusal):
            raise self.functions
        if not isinstance(self.functions, dict):
            return self.functions
        return {
            "functions": [
                {
                    "function_id": function_id,
                    "description": None,
                    "request_format": {"type": "object", "properties": dict.fromkeys(fields, True)},
                    "response_format": None,
                    "metadata": None,
                }
                for function_id, fields in self.functions.items()
            ]
        }
