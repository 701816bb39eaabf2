"""The page in a headless Chromium, where there is one."""

import time

import pytest
from chromium import CHROMIUM, Page
from serving import Scripted, running, tone, wait_for
from websockets.sync.client import connect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")


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
