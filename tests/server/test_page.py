"""The page in a headless Chromium, where there is one: COSYQ_CHROMIUM names it, or PATH has it."""

import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from serving import Scripted, running, tone, wait_for
from websockets.sync.client import connect

CHROMIUM = os.environ.get("COSYQ_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")


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


@pytest.fixture
def browser(tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-proxy-server"]
    flags += [
        "--disable-dev-shm-usage",
        "--autoplay-policy=no-user-gesture-required",
        f"--user-data-dir={tmp_path}/profile",
    ]
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    port_file = Path(tmp_path, "profile", "DevToolsActivePort")
    wait_for(lambda: port_file.exists() and port_file.read_text().strip(), 60)
    port = int(port_file.read_text().split()[0])
    yield lambda: next(
        tab["webSocketDebuggerUrl"]
        for tab in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        if tab["type"] == "page"
    )
    process.terminate()
    process.wait(20)


class Growing(Scripted):
    """It can be given voices."""

    added = ()

    def voices(self):
        return [*super().voices(), *self.added]

    def add_voice(self, name, audio, transcript):
        assert audio.stat().st_size == 1000
        self.added = (*self.added, name)


def speaks(speech):
    for _ in range(4):
        speech.put(tone(0.25))
        time.sleep(0.05)


def test_the_page_speaks_and_takes_a_voice(browser, tmp_path):
    recording = tmp_path / "me.wav"
    recording.write_bytes(bytes(1000))
    speaker = Growing(speaks)
    with running(lambda _: speaker) as server, connect(browser(), max_size=None) as socket:
        page = Page(socket)
        page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        field = "document.getElementById('speak').elements"
        wait_for(lambda: page.do(f"document.getElementById('speak') && {field}.voice.options.length") == 3)
        wait_for(lambda: "int8" in page.do("document.getElementById('health').textContent"))

        page.do(f"{field}.input.value = 'From a page.'; {field}.voice.value = 'magnus'; {field}.seed.value = '7'")
        page.do("document.querySelector('#speak button').click()")
        said = page.reads("said", "1.0 s")
        assert said.startswith("first audio after ")
        assert said.endswith("seed 7")
        request = speaker.requests[-1]
        assert (request.text, request.voice, request.seed) == ("From a page.", "magnus", 7)
        wait_for(lambda: page.do("document.getElementById('stop').disabled"))

        form = "document.getElementById('add').elements"
        page.do("document.querySelector('details').open = true")
        page.do(f"{form}.name.value = 'ada'; {form}.transcript.value = 'Words.'; {form}.consent.checked = true")
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        node = page.call("DOM.querySelector", nodeId=root, selector="[name=audio_sample]")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=node, files=[str(recording)])
        page.do("document.querySelector('#add button').click()")
        page.reads("added", "ada is there")
        assert page.do(f"{field}.voice.value") == "ada"

        page.do(
            f"{field}.speed.value = '3'; {field}.input.value = '...'; document.querySelector('#speak button').click()"
        )
        assert "nothing to say" in page.reads("said", "nothing")
        assert {url.split("/")[2] for url in page.asked} == {f"127.0.0.1:{server.port}"}
        assert [text for text in page.complaints if "400" not in str(text)] == []  # it logs the refusal above
