"""Voices over HTTP: added from a recording, spoken with, removed; and what is sent in place of a recording."""

import io
import json
import shutil
import struct
import uuid
import wave

import numpy as np
import openai
import pytest
import soundfile
from conftest import GOLDEN
from serving import BODY, running, says, scripted, tone

import cosyq
from cosyq.artifact.reader import open_artifact
from cosyq.audit import verify_artifact
from cosyq.recipe import bundled_checkpoint
from cosyq.server.batch import BatchSpeaker

RECORDING = (GOLDEN.parent / "audio" / "zero_shot_prompt.wav").read_bytes()


@pytest.fixture(scope="module")
def copied(mini_artifact, tmp_path_factory):
    """A copy, for voices to come and go."""
    return shutil.copytree(mini_artifact, tmp_path_factory.mktemp("voices") / "mini")


@pytest.fixture(scope="module")
def server(copied):
    def loader(on_fatal):
        tts = cosyq.load(copied, device="cpu")
        return BatchSpeaker(lambda: tts, longest_queue=4, on_fatal=on_fatal, encoders=bundled_checkpoint("mini"))

    with running(loader) as made:
        yield made


def form(sample=RECORDING, **fields):
    """A multipart body and its type; a field of None is left out."""
    boundary, parts = uuid.uuid4().hex, []
    for name, value in ({"name": "me", "consent": "true"} | fields).items():
        if value is not None:
            parts.append(f'content-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    if sample is not None:
        head = b'content-disposition: form-data; name="audio_sample"; filename="../../x.wav"\r\n\r\n'
        parts.append(head + sample + b"\r\n")
    body = b"".join(f"--{boundary}\r\n".encode() + part for part in parts) + f"--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def add(server, sample=RECORDING, origin=None, **fields):
    body, kind = form(sample, **fields)
    headers = {"content_type": kind} | ({"origin": origin} if origin else {})
    return server.request("POST", "/v1/audio/voices", body, **headers)


def names(server):
    return [voice["id"] for voice in server.request("GET", "/v1/audio/voices").json["voices"]]


def test_a_voice_is_added_spoken_with_and_removed(server, copied):
    before, aliases = names(server), server.request("GET", "/v1/audio/voices").json["aliases"]
    answer = add(server, name="aunt.Ada", consent="signed 2026-11-02, folder 7")
    assert answer.status == 200, answer.body
    assert (answer.json["id"], answer.json["object"]) == ("aunt.Ada", "audio.voice")
    assert names(server) == ["default", *sorted([*before[1:], "aunt.Ada"])]
    assert server.request("GET", "/v1/audio/voices").json["aliases"] == aliases, "nobody's voice has changed"
    spoken = [server.speak(voice=voice, response_format="pcm", seed=1).body for voice in ("aunt.Ada", "default")]
    assert len(spoken[0]) > 10_000
    assert spoken[0] != spoken[1]
    verify_artifact(open_artifact(copied))  # it is listed and hashed, as one of the command line's
    assert "aunt.Ada" in open_artifact(copied).voice_files()
    assert add(server, name="aunt.Ada").error["code"] == "voice_exists"
    assert server.request("DELETE", "/v1/audio/voices/aunt.Ada").json["deleted"] is True
    assert names(server) == before
    assert server.speak(voice="aunt.Ada").error["code"] == "voice_not_found"
    assert server.request("DELETE", "/v1/audio/voices/aunt.Ada").status == 404
    verify_artifact(open_artifact(copied))


def wav(rate=24_000, seconds=2.0):
    noise = np.random.default_rng(0).normal(0, 0.1, round(rate * seconds))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((noise * 32767).clip(-32767, 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def patched(data, offset, form_, value):
    found = bytearray(data)
    struct.pack_into(form_, found, offset, value)
    return bytes(found)


def flac_bomb():
    """An hour of silence and then some noise: 10 MB would hold weeks."""
    buffer = io.BytesIO()
    silence = np.zeros(3600 * 8000, np.int16)
    silence[:8000] = 3000
    soundfile.write(buffer, silence, 8000, format="FLAC")
    assert len(buffer.getvalue()) < 1 << 20
    return buffer.getvalue()


HOSTILE = {
    "empty": b"",
    "text": b"hello" * 100,
    "html": b"<html><script>alert(1)</script></html>",
    "zip": b"PK\x03\x04" + bytes(1000),
    "header only": RECORDING[:44],
    "half a header": RECORDING[:20],
    "no rate": patched(RECORDING, 24, "<I", 0),
    "a forged rate": patched(RECORDING, 24, "<I", 0xFFFFFFFF),
    "a thousand channels": patched(RECORDING, 22, "<H", 1000),
    "too short": wav(seconds=0.5),
    "too long": wav(rate=8000, seconds=31.0),
    "silent": wav()[:44] + bytes(96_000),
    "a pickle": b"\x80\x04\x95" + bytes(50),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_recording_is_refused(server, what):
    before = names(server)
    answer = add(server, HOSTILE[what])
    assert answer.status == 400, answer.body
    assert answer.error["param"] == "audio_sample"
    assert "/tmp" not in answer.error["message"]
    assert names(server) == before


def test_a_bomb_costs_no_more_than_what_is_heard_of_it(server):
    assert "longer than 30 seconds" in add(server, flac_bomb()).error["message"]


def test_a_size_that_is_only_declared_is_not_believed(server):
    """2 GB by its header, three seconds by its content."""
    size = RECORDING.index(b"data") + 4
    forged = patched(patched(RECORDING, 4, "<I", 2_000_000_000), size, "<I", 2_000_000_000)
    assert add(server, forged, name="forged").status == 200
    assert server.request("DELETE", "/v1/audio/voices/forged").status == 200


def test_a_large_upload_is_refused_by_its_size(server):
    assert add(server, bytes(11 << 20)).error["code"] == "body_too_large"
    just_over = add(server, RECORDING + bytes((10 << 20) + 1 - len(RECORDING)))
    assert (just_over.status, just_over.error["param"]) == (413, "audio_sample")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": "../me"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": ".hidden"}, "name"),
        ({"name": "ü"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "n" * 101}, "name"),
        ({"name": None}, "name"),
        ({"consent": None}, "consent"),
        ({"consent": "false"}, "consent"),
        ({"consent": " "}, "consent"),
        ({"transcript": "t" * 5000}, "transcript"),
        ({"transcript": "far too much to say in so short a time " * 20}, "audio_sample"),
        ({"sample": None}, "audio_sample"),
    ],
)
def test_what_is_wrong_with_a_field_is_said(server, fields, param):
    before = names(server)
    answer = add(server, **fields)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert names(server) == before


def test_a_page_from_elsewhere_cannot_add_one(server):
    assert add(server, origin="https://example.com").error["code"] == "foreign_origin"
    here = f"http://127.0.0.1:{server.port}"
    assert add(server, b"", origin=here).status == 400


def test_a_server_without_encoders_says_so(copied):
    def loader(on_fatal):
        return BatchSpeaker(lambda: cosyq.load(copied, device="cpu"), longest_queue=4, on_fatal=on_fatal)

    with running(loader) as server:
        answer = add(server)
        assert answer.status == 503
        assert "--source" in answer.error["message"]


def test_a_key_is_needed_to_add_or_remove(tmp_path):
    with scripted(says(tone(0.5)), keys=("key",)) as (server, _):
        assert add(server).status == 401
        assert server.request("DELETE", "/v1/audio/voices/default").status == 401
        with pytest.raises(openai.AuthenticationError):
            server.openai.audio.speech.create(**{k: BODY[k] for k in ("model", "input", "voice")})
        assert json.loads(server.request("GET", "/v1/audio/voices").body)["voices"]


def test_voices_can_be_fixed():
    with scripted(says(tone(0.5)), fixed_voices=True) as (server, speaker):
        for answer in (add(server), server.request("DELETE", "/v1/audio/voices/iris")):
            assert answer.status == 403
            assert answer.error["code"] == "voices_fixed"
        assert names(server) == speaker.voices()
