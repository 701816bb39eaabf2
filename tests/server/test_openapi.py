"""The OpenAPI document is kept: whatever is sent where it says, nothing comes back that it does not say."""

import json
import string
import uuid
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import says, scripted, tone

from cosyq.server.app import CLIENT_GONE

FUZZ = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # half surrogates too
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def server():
    with scripted(says(tone(0.02)), longest_queue=1000) as (made, _):
        yield made


@pytest.fixture(scope="module")
def document(server):
    return server.request("GET", "/openapi.json").json


def values(schema, document):
    """What a schema allows, or nearly: the edges of numbers and lengths are taken from both sides."""
    if "$ref" in schema:
        return values(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    if "anyOf" in schema:
        return st.one_of([values(one, document) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "object":
            fields = {name: values(one, document) | JUNK for name, one in schema.get("properties", {}).items()}
            return st.fixed_dictionaries({}, optional=fields)
        case "integer":
            return st.integers(schema.get("minimum", 0) - 1, schema.get("maximum", 9) + 1)
        case "number":
            return st.floats(schema.get("minimum", 0) - 1, schema.get("maximum", 9) + 1)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case _:
            return st.sampled_from(["alloy", "tts-1", "iris", "Hello there.", "en", "9"]) | TEXT


def kept(answer, operation):
    """The answer is one that the document describes."""
    assert str(answer.status) in operation["responses"], answer.body[:300]
    assert answer.status < 500, answer.body[:300]
    if answer.status >= 400:
        assert answer.error["message"]
    else:
        assert answer.body
        kinds = operation["responses"][str(answer.status)].get("content", {})
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in kinds, kind


def test_speech(server, document):
    operation = document["paths"]["/v1/audio/speech"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    needed = {"model": st.just("tts-1"), "voice": st.just("iris"), "input": st.just("Hello.")}
    seen = set()

    @FUZZ
    @given(values(schema, document), st.fixed_dictionaries({}, optional=needed))
    def fuzz(body, sound):
        answer = server.request(
            "POST", "/v1/audio/speech", json.dumps(body | sound).encode(), content_type="application/json"
        )
        kept(answer, operation)
        seen.add(answer.status)

    fuzz()
    assert {200, 400} <= seen


def test_voices(server, document):
    operation = document["paths"]["/v1/audio/voices"]["post"]
    names = [*document["components"]["schemas"]["Body_add_v1_audio_voices_post"]["properties"], "other"]
    part = st.tuples(st.sampled_from(names), st.sampled_from(["", 'filename="../../x"; ']), st.binary(max_size=200))

    @FUZZ
    @given(st.lists(part, max_size=6), st.booleans())
    def fuzz(parts, whole):
        mark = uuid.uuid4().hex
        body = b"".join(
            f'--{mark}\r\ncontent-disposition: form-data; {file}name="{name}"\r\n\r\n'.encode() + data + b"\r\n"
            for name, file, data in parts
        )
        body += f"--{mark}--\r\n".encode() if whole else b""
        kind = f"multipart/form-data; boundary={mark}"
        kept(server.request("POST", "/v1/audio/voices", body, content_type=kind), operation)

    fuzz()


def test_what_takes_no_body(server, document):
    """Every other path, with any name in it."""
    others = [
        (path, method.upper(), operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if "requestBody" not in operation
    ]
    assert len(others) >= 8

    @FUZZ
    @given(st.sampled_from(others), st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
    def fuzz(other, name):
        path, method, operation = other
        answer = server.request(method, path.replace("{name}", quote(name, safe="")))
        if "/" in name and "{name}" in path:  # a path of its own
            assert answer.status in (200, 404, 405)
        else:
            kept(answer, operation)

    fuzz()


def test_the_document_describes_every_path(document):
    assert {"/v1/audio/speech", "/v1/audio/voices", "/v1/audio/voices/{name}", "/v1/models", "/health"} <= set(
        document["paths"]
    )
    assert CLIENT_GONE not in document["paths"]["/v1/audio/speech"]["post"]["responses"]
    for path in document["paths"]:
        assert set(path) <= set(string.ascii_lowercase + string.digits + "/{}_."), path
