"""A headless Chromium over its own protocol, where there is one: COSYQ_CHROMIUM names it, or PATH has it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import wait_for

CHROMIUM = os.environ.get("COSYQ_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One page over the DevTools protocol; notes what it asks for and what it complains about."""

    def __init__(self, socket):
        self._socket, self._numbers = socket, itertools.count(1)
        self.asked, self.complaints = [], []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message):
        match message["method"]:
            case "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"])
            case "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])

    def do(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def reads(self, element, part):
        wait_for(lambda: part in (self.do(f"document.getElementById('{element}').value ?? ''") or ""))
        return self.do(f"document.getElementById('{element}').value")


@contextmanager
def chromium(folder: Path) -> Iterator[Callable[[], str]]:
    """Start one with a profile in `folder`; gives a function that returns the address of its page's socket."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-proxy-server"]
    flags += [
        "--disable-dev-shm-usage",
        "--autoplay-policy=no-user-gesture-required",
        f"--user-data-dir={folder}/profile",
    ]
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        port_file = Path(folder, "profile", "DevToolsActivePort")
        wait_for(lambda: port_file.exists() and port_file.read_text().strip(), 60)
        port = int(port_file.read_text().split()[0])
        yield lambda: next(
            tab["webSocketDebuggerUrl"]
            for tab in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            if tab["type"] == "page"
        )
    finally:
        process.terminate()
        process.wait(20)
