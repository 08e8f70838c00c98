"""A worker on the official Python SDK, told what to do by lines of JSON on stdin; it reports by lines on stdout.

Runs in an environment of its own that has `iii-sdk` and nothing of ours.
"""

from __future__ import annotations

import json
import sys
import threading
import warnings

import iii

warnings.simplefilter("ignore")
out = threading.Lock()


def report(**said):
    with out:
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def failure(error):
    return {"code": getattr(error, "code", type(error).__name__), "message": getattr(error, "message", str(error))}


def handler(function_id, answer, value):
    def handle(data):
        report(event="called", function_id=function_id, data=data)
        if answer == "echo":
            return data
        if answer == "raise":
            raise RuntimeError(value)
        if answer == "call":
            return client.trigger({"function_id": value, "payload": data})
        return value

    return handle


def call(command):
    request = {"function_id": command["function_id"], "timeout_ms": command.get("timeout_ms", 30000)}
    if "payload" in command:
        request["payload"] = command["payload"]
    if command.get("void"):
        request["action"] = iii.TriggerAction.Void()
    if command.get("queue"):
        request["action"] = iii.TriggerAction.Enqueue(queue=command["queue"])
    try:
        return {"result": client.trigger(request)}
    except Exception as error:  # noqa: BLE001 - reported to the test
        return {"error": failure(error)}


def act(command):
    match command["do"]:
        case "register":
            functions[command["id"]] = client.register_function(
                command["id"], handler(command["id"], command["answer"], command.get("value"))
            )
        case "unregister":
            functions.pop(command["id"]).unregister()
        case "trigger":
            triggers[command["name"]] = client.register_trigger(
                {"type": command["type"], "function_id": command["function_id"], "config": command["config"]}
            )
        case "untrigger":
            triggers.pop(command["name"]).unregister()
        case "call":
            return call(command)
        case "stop":
            client.shutdown()
    return {}


options = json.loads(sys.argv[2])
functions, triggers = {}, {}
client = iii.register_worker(
    sys.argv[1],
    iii.InitOptions(
        worker_name="python-worker", otel={"enabled": options["telemetry"]}, headers=options.get("headers")
    ),
)
report(event="ready")
for line in sys.stdin:
    command = json.loads(line)
    report(event="done", **act(command))
    if command["do"] == "stop":
        break
