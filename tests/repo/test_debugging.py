"""The page about debugging: a debugger attaches to its command and stops at breakpoints."""

import inspect
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dream_fast
from dream_fast.engine import run
from dream_fast.engine.training import trainer

PAGE = Path(dream_fast.__file__).parent / "docs" / "debugging.md"
SMALL = """
    --text hamburger --device cpu --iters 3 --log_every 1 --seed 7 --w 16 --h 16 --W 16 --H 16 --six_views
    --dataset_size_valid 1 --n_levels 3 --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16
    --occupancy_resolution 16
""".split()


class Client:
    """A client of the debug adapter protocol, like an editor."""

    def __init__(self, port: int, process: subprocess.Popen):
        while True:  # the server opens its port when it has started
            try:
                self.socket = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                assert process.poll() is None, "nothing listens"
                time.sleep(0.1)
        self.stream, self.sent = self.socket.makefile("rb"), 0

    def close(self) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, command: str, **arguments) -> None:
        self.sent += 1
        message = {"seq": self.sent, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))

    def receive(self, kind: str, name: str) -> dict:
        """The body of the next message of this kind ("event" or "response") and name; others are skipped."""
        while True:
            length = 0
            while line := self.stream.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert length, f"the connection ended before the {kind} {name}"
            message = json.loads(self.stream.read(length))
            if message["type"] == kind and message.get("event", message.get("command")) == name:
                assert message.get("success", True), message
                return message.get("body", {})

    def ask(self, command: str, **arguments) -> dict:
        self.send(command, **arguments)
        return self.receive("response", command)


def line_of(module, words: str) -> int:
    """The number of the only line of `module` with `words`."""
    (number,) = [i for i, line in enumerate(inspect.getsource(module).splitlines(), start=1) if words in line]
    return number


def commands() -> list[str]:
    """The shell commands of the page."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no docs")
def test_debugger_stops_run(tmp_path):
    """A debugger stops a run at a breakpoint in a step, reads values, and lets it continue to its end."""
    pytest.importorskip("debugpy", reason="debugpy is not installed; the extra [test] has it")
    (line,) = [line for line in commands() if "debugpy --listen" in line]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python, *words = shlex.split(line)
    assert python == ".venv/bin/python" and words[-3:] == ["dream_fast.cli", "--text", "a hamburger"]
    assert "127.0.0.1:5678" in words
    words = [word.replace(":5678", f":{port}") for word in words[:-2]]
    command = [sys.executable, *words, *SMALL, "--workspace", str(tmp_path / "trial")]
    environment = os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # a notice on stderr
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    client = None
    try:
        client = Client(port, process)
        client.ask("initialize", adapterID="test")
        client.send("attach", justMyCode=True)
        client.receive("event", "initialized")
        places = {run: line_of(run, "Loop(trainer, workspace"), trainer: line_of(trainer, "self.step += 1")}
        for module, number in places.items():
            source, breakpoint_ = {"path": module.__file__}, {"line": number}
            if module is trainer:
                breakpoint_["condition"] = "self.step == 1"
            (set_,) = client.ask("setBreakpoints", source=source, breakpoints=[breakpoint_])["breakpoints"]
            assert set_["verified"]
        client.ask("configurationDone")
        for module, number in places.items():
            thread = client.receive("event", "stopped")["threadId"]
            frame = client.ask("stackTrace", threadId=thread, levels=1)["stackFrames"][0]
            assert (frame["source"]["path"], frame["line"]) == (module.__file__, number)
            if module is trainer:
                shown = client.ask("evaluate", expression="(self.step, result.t.shape)", frameId=frame["id"])
                assert shown["result"] == "(1, torch.Size([1]))"
            client.ask("continue", threadId=thread)
        assert process.wait() == 0
        assert (tmp_path / "trial" / "report.html").is_file()
    finally:
        process.kill()
        process.wait()
        if client is not None:
            client.close()  # the adapter, a process of its own, ends with it
