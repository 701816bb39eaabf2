"""The page of an evaluation: whole, bounded, inert, and as a browser shows it."""

import base64
import hashlib
import io
import math
import re
import struct
import time
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from chromium import CHROMIUM, Page
from evaluations import MODULES, RATE, evaluation, finding, replayed, said, sound
from waiting import wait_for
from websockets.sync.client import connect

from cosyq.audio.sinks import to_s16
from cosyq.eval.figures import spectrograms
from cosyq.eval.page import MEDIA_BYTES, page, write_page
from cosyq.eval.wording import verdict, written
from cosyq.eval.worst import worst

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Strict(HTMLParser):
    """Every element is closed where it has to be; notes elements with attributes, and text by element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def shown(self):
        """What a reader sees, spaces made one."""
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("style", "script")).split()).replace(
            " ,", ","
        )


def rows(text, caption):
    """The cells of the table with a caption, tags taken out."""
    table = next(part for part in text.split("<table>")[1:] if caption in part.partition("</caption>")[0])
    body = table.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("<tr>")[1:]]
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_it_is_one_whole_file_that_asks_for_nothing():
    text = page(evaluation())
    assert text == page(evaluation())
    parsed = Strict(text)
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["aria-labelledby"] for _, a in parsed.elements if "aria-labelledby" in a} <= set(ids)
    assert parsed.all("html") == [{"lang": "en"}]
    assert all("alt" in image for image in parsed.all("img"))
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    (policy,) = (meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_finding_is_there_with_its_interval():
    shown = evaluation()
    text = page(shown)
    table = rows(text, "Every measure")
    assert len(table) == len(shown.findings) == text.count('<svg class="bar')
    for cells, found in zip(table, shown.findings, strict=True):
        assert found.metric.key in cells[0]
        assert verdict(found) in cells[1]
        assert cells[4] == written(found.artifact)
        assert cells[5] == (written(found.reference) if found.reference else "")
        assert cells[2] == (written(found.difference, signed=True) if found.reference else "")
        assert cells[6] == "24 30 needed"
    for name, value in (("recognizer", "made up 1.0"), ("beside", "tiny-fp32")):
        assert f"{name} {value}" in Strict(text).shown


def test_a_bar_is_where_its_numbers_are():
    """From the left end of the scale to the right: zero in the middle, the claim around it."""
    text = page(evaluation(findings=(finding("spoken.errors", 3.0, 2.0, 4.0),)))
    low, high = map(float, re.search(r'class="range" d="M([\d.]+) 12H([\d.]+)M', text).groups())
    claim, width = map(float, re.search(r'class="claim" x="([\d.]+)" y="2" width="([\d.]+)"', text).groups())
    value = float(re.search(r'class="value" cx="([\d.]+)"', text)[1])
    assert 100 - claim == pytest.approx(claim + width - 100)
    one = width / 2  # the claim is one percent
    assert [(x - 100) / one for x in (low, value, high)] == pytest.approx([2, 3, 4], abs=0.01)
    assert 'class="bar lost"' in text


def test_what_is_not_finite_is_said_and_not_drawn():
    text = page(evaluation(findings=(finding("spoken.errors", math.nan, math.nan, math.nan),)))
    Strict(text)
    assert '<svg class="bar' not in text
    assert rows(text, "Every measure")[0][1:3] == ["○ open", "not finite"]


def test_the_modules_that_are_shown_are_all():
    text = page(evaluation())
    table = rows(text, f"{len(MODULES)} modules")
    assert sorted(cells[0] for cells in table) == sorted(name for name, *_ in MODULES)
    total = sum(size for _, _, size, _ in MODULES)
    assert sum(int(cells[2].replace(",", "")) for cells in table) == total
    assert f"{len(MODULES)} modules, {total:,} bytes" in Strict(text).shown
    formats = {cells[0]: cells for cells in rows(text, "By format")}
    assert sum(int(cells[1]) for cells in formats.values()) == len(MODULES)
    assert sum(int(cells[2].replace(",", "")) for cells in formats.values()) == total
    assert formats["nf4/64"][3:] == ["11 %", "llm.layers.199.mlp.up_proj"]
    drawn = re.findall(r'<g class="f\d"><title>([^:]*): ', text)
    assert drawn == [name for name, *_ in MODULES if not name.startswith("vocoder.")]  # of which nothing was lost
    assert "None of its 60 modules lost anything" in text
    heights = {
        name: float(height)
        for name, height in re.findall(
            r'<title>([^:]*): .*?<rect x="\d+" y="[\d.]+" width="\d+" height="([\d.]+)"', text
        )
    }
    assert heights["llm.norm"] == 0
    assert 0 < heights["flow.estimator.blocks.0.ff.up"] < heights["llm.layers.0.mlp.up_proj"] < 120


def test_the_worst_are_those_who_lost_words_then_those_who_sound_different():
    found = evaluation(
        spoken=(
            said("as good", errors=(10, 10)),
            said("better", errors=(0, 20)),
            said("worse", errors=(30, 10)),
            said("worst", errors=(60, 10)),
        ),
        exact=(replayed("near", 0.5), replayed("far", 2.5), replayed("same", 0.0)),
    )
    assert [item.compared.text for item in worst(found, 10)] == ["worst", "worse", "far", "near"]
    assert [item.compared.text for item in worst(found, 3)] == ["worst", "worse", "far"]
    equal = [said(text, seed=seed, errors=(9, 0)) for text, seed in (("b", 0), ("a", 2), ("a", 1), ("nan", 0))]
    equal[3].artifact.values["spoken.errors"] = math.nan
    listed = [(item.compared.text, item.compared.seed) for item in worst(evaluation(spoken=tuple(equal), exact=()), 10)]
    assert listed == [("nan", 0), ("a", 1), ("a", 2), ("b", 0)]
    shown = Strict(page(evaluation(spoken=(), exact=()))).shown
    assert "utterances" not in shown.partition("What each module lost")[0].partition("four of five cases")[2]


def test_an_utterance_has_both_sides():
    mine, other = sound(2.5, 440), sound(1.0, 220)
    item = said("A text.", errors=(50, 0), samples=mine, other=other, understood=("a test", "a text"), finish="length")
    text = page(evaluation(spoken=(item,), exact=()))
    parsed = Strict(text)
    assert "artifact, 2.50 s, ran to its bound understood: a test" in parsed.shown
    assert "reference, 1.00 s understood: a text" in parsed.shown
    for player, expected in zip(parsed.all("audio"), (mine, other), strict=True):
        data = base64.b64decode(player["src"].removeprefix("data:audio/flac;base64,"))
        samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
        assert rate == RATE
        assert samples.astype("<i2").tobytes() == to_s16(expected)
        assert "controls" in player
    sizes = [decoded(base64.b64decode(image["src"].partition(",")[2])).shape for image in parsed.all("img")]
    assert sizes == [(80, 125), (80, 125)]  # of one width: a place is the same time in both
    assert text.count("<button") == 1
    silent = page(evaluation(spoken=(said("Nothing.", errors=(50, 0), samples=sound(0), other=other),), exact=()))
    assert "no sound" in silent
    assert "<button" not in silent
    assert len(Strict(silent).all("audio")) == 1


def decoded(png):
    """An 8-bit greyscale PNG, by a second hand."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        data = png[position + 8 : position + 8 + length]
        assert zlib.crc32(kind + data) == struct.unpack_from(">I", png, position + 8 + length)[0]
        chunks[kind], position = data, position + 12 + length
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (lines[:, 0] == 2).all()
    return np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8)


def test_a_spectrogram_is_dark_where_it_is_loud():
    low, high, nothing, soft = spectrograms([sound(1, 200), sound(1, 6000), None, sound(0.5, 200, 0.003)])
    assert nothing is None
    low, high, soft = map(decoded, (low, high, soft))
    assert low.shape == high.shape == soft.shape == (80, 50)
    assert low[:, 10:40].mean(1).argmin() > high[:, 10:40].mean(1).argmin()  # the lowest bin is the last row
    assert low.min() == 0
    assert 60 < soft[:, :25].min() < 230  # 40 dB below, on the scale of the others
    assert (soft[:, 25:] == 255).all()
    assert spectrograms([None, sound(0)]) == [None, None]


def test_its_size_is_bounded():
    noise = np.random.default_rng(0).uniform(-1, 1, 30 * RATE).astype(np.float32)
    loud = tuple(
        said(
            f"{n} " + "x" * 5000, seed=n, errors=(50.0 - n, 0), samples=noise, other=noise, understood=("y" * 5000, "")
        )
        for n in range(12)
    )
    text = page(evaluation(spoken=loud))
    assert MEDIA_BYTES / 2 < len(text) < 10_000_000
    parsed = Strict(text)
    titles = [heading for tag, heading in parsed.texts if tag == "h3"]
    assert [title.split()[0] for title in titles[:10]] == [str(n) for n in range(10)]
    first, last = text.split("<article")[1], text.split("<article")[10]
    assert first.count("<audio") == 2
    assert first.count("the first 20 seconds") == 2
    assert "<audio" not in last
    assert last.count("the page would be too large") == 2


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 191 }}{% raw %}",
    "</title></style></script><svg/onload=alert(1)>",
    "&lt;b&gt; & &amp;",
    "\u202egnp.exe\u2066",
    "\x00\x08\ud800 end",
]


def test_texts_and_names_are_shown_and_nothing_else(tmp_path):
    plain, hostile = evaluation(), " ".join(HOSTILE)
    item = said(hostile, errors=(50, 0), samples=sound(1), other=sound(1), understood=(hostile, hostile))
    item = type(item)(item.text, hostile, 0, item.artifact, item.reference)
    changed = evaluation(
        artifact=hostile,
        against=hostile,
        about=hostile,
        extra={hostile: hostile},
        modules=((hostile, hostile, 1, 0.1), *MODULES),
        spoken=(item, *plain.spoken[1:]),
    )
    text = page(changed)
    parsed = Strict(text)
    assert {tag for tag, _ in parsed.elements} == {tag for tag, _ in Strict(page(plain)).elements}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert (
        len(parsed.all("script"))
        == len(parsed.all("title")) - len(re.findall(r"<(?:g|svg)[^>]*>\s*<title>", text))
        == 1
    )
    visible = " ".join("".join(c if c.isprintable() else " " for c in hostile).split())
    assert parsed.shown.count(visible) >= 8
    assert "1337" not in text
    write_page(tmp_path / "report.html", changed)
    assert (tmp_path / "report.html").read_text("utf-8") == text


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_browser_shows_and_plays_it(browser, tmp_path):
    spoken = said("<script>alert(1)</script>", errors=(50, 0), samples=sound(3), other=sound(2.5))
    write_page(tmp_path / "report.html", evaluation(spoken=(spoken,)))
    with connect(browser(), max_size=None) as socket:
        shown = Page(socket)
        shown.call("Page.navigate", url=f"file://{tmp_path}/report.html")
        wait_for(lambda: shown.do("document.readyState") == "complete")
        players = "[...document.querySelectorAll('audio')]"
        wait_for(lambda: shown.do(f"{players}.every((player) => player.duration > 0)"))
        assert shown.do(f"{players}.slice(0, 2).map((player) => player.duration)") == pytest.approx([3, 2.5], abs=0.01)
        assert shown.do("[...document.images].every((image) => image.naturalHeight === 80)")
        assert shown.do("document.querySelector('h2').getBoundingClientRect().height") > 10
        assert shown.do("getComputedStyle(document.querySelector('.lost')).color") != shown.do(
            "getComputedStyle(document.body).color"
        )
        for width in (360, 1280):  # nothing is wider than the window, as tables and charts scroll by themselves
            shown.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
            assert shown.do("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0

        button = "document.querySelector('.pair button')"
        assert shown.do(f"{button}.textContent") == "Play the artifact"
        shown.do(f"{button}.click()")
        wait_for(lambda: shown.do(f"{players}[0].currentTime") > 0.2)
        assert shown.do(f"{button}.textContent") == "Switch to the reference"
        shown.do(f"{button}.click()")
        wait_for(lambda: not shown.do(f"{players}[1].paused"))
        assert shown.do(f"{players}[0].paused")
        assert shown.do(f"{players}[1].currentTime") >= 0.2
        shown.do(f"{players}[2].play()")  # of another utterance
        wait_for(lambda: shown.do(f"{players}[1].paused"))
        time.sleep(0.1)
        assert shown.complaints == []
        assert {url.partition(":")[0] for url in shown.asked} <= {"file", "data"}
        assert len([url for url in shown.asked if url.startswith("file:")]) == 1
