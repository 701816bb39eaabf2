"""The model card, read as the Hub reads it."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from cosyq.artifact.manifest import SourceRecord
from cosyq.artifact.reader import open_artifact
from cosyq.errors import ArtifactError
from cosyq.publish.card import model_card
from cosyq.publish.reports import Report, read_report

REPO = "me/tiny"
SOURCE = "FunAudioLLM/Fun-CosyVoice3-0.5B-2512"


@pytest.fixture
def manifest(artifact_of):
    """The nf4 artifact's, as if it came from the published repository."""
    manifest = open_artifact(artifact_of("nf4")).manifest
    return replace(manifest, source=SourceRecord(SOURCE, "29e0", manifest.source.files))


def sections(text):
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in text.split("\n## ")[1:]}


def test_what_the_hub_reads(manifest):
    text = model_card(manifest, REPO, {})
    card = ModelCard(text, ignore_metadata_errors=False)
    assert isinstance(card.data, ModelCardData)
    assert card.data.to_dict() == {
        "base_model": SOURCE,
        "base_model_relation": "quantized",
        "language": ["zh", "en", "ja", "ko", "de", "es", "fr", "it", "ru"],
        "library_name": "cosyq",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-speech",
        "tags": ["text-to-speech", "voice-cloning", "bf16", "fp16", "int8", "nf4"],
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert text == model_card(manifest, REPO, {})


def test_the_hub_has_nothing_against_it(manifest, hub):
    """Asked as its own client asks; the stand-in knows the keys of ours and what they may be."""
    text = model_card(manifest, REPO, {})
    ModelCard(text).validate(repo_type="model")
    assert hub.requests == ["POST /api/validate-yaml"]
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard(text.replace('"quantized"', '"squeezed"')).validate(repo_type="model")


def test_what_a_person_reads(manifest):
    text = model_card(manifest, REPO, {})
    found = sections(text)
    assert found["Use"].count("\ncosyq ") == 2
    assert f"-a hf://{REPO} " in found["Use"]
    assert "It holds no voices" in found["Use"]
    assert found["Quality"] == found["Speed"] == "Not measured."
    rows = [line.strip("| ").split(" | ") for line in found["What is packed how"].splitlines() if "|" in line]
    packed = {(stage, fmt): int(size.replace(",", "")) for stage, fmt, _, size, _ in rows[2:]}
    assert sum(packed.values()) == sum(m.bytes for m in manifest.modules)
    assert packed["llm", "nf4/32+dq"] == sum(
        m.bytes for m in manifest.modules if m.name.startswith("llm.") and str(m.format) == "nf4/32+dq"
    )
    for name, record in manifest.files.items():
        assert f"| {name} | {record.bytes:,} | `{record.sha256}` |" in found["Hashes"]
    for sha256 in manifest.source.files.values():
        assert sha256 in found["Where it came from"]
    recipe = found["Where it came from"].split("```json\n")[1].partition("\n```")[0]
    assert json.loads(recipe) == manifest.recipe
    assert "whose owners agreed" in found["Cloning voices"]
    assert "Apache-2.0" in found["Licence"]
    assert "Languages: zh, en" in found["Limits"]


def test_an_unknown_checkpoint_is_given_no_licence_and_no_language(manifest):
    unknown = replace(manifest, source=SourceRecord(None, None, manifest.source.files))
    text = model_card(unknown, REPO, {})
    data = ModelCard(text).data.to_dict()
    assert not {"license", "language", "base_model", "base_model_relation"} & data.keys()
    assert "does not know" in sections(text)["Licence"]
    mini = replace(unknown, recipe={**unknown.recipe, "source": {"bundled": "mini"}})
    data = ModelCard(model_card(mini, REPO, {})).data
    assert (data.language, data.license, data.base_model) == (["en"], "apache-2.0", None)


def test_measured_numbers_are_tables(manifest, tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(
        json.dumps({"about": "Fifty sentences.", "columns": ["what", "WER"], "rows": [["int8", 0.24], ["a|b", 1]]})
    )
    text = model_card(manifest, REPO, {"eval.json": read_report(path)})
    found = sections(text)
    assert found["Quality"] == "Fifty sentences.\n\n| what | WER |\n| --- | --- |\n| int8 | 0.24 |\n| a\\|b | 1 |"
    assert found["Speed"] == "Not measured."


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"about": "x", "columns": [], "rows": []}',
        '{"about": "x", "columns": ["a"], "rows": [[1, 2]]}',
        '{"about": "x", "columns": ["a"], "rows": [[true]]}',
        '{"about": 1, "columns": ["a"], "rows": [[[]]]}',
        '{"about": "x", "columns": ["a"], "rows": []}' + " " * (1 << 20),
        "[" * 100_000,
    ],
)
def test_what_is_no_report(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"eval\.json: not a report"):
        read_report(tmp_path / "eval.json")


def test_what_a_manifest_says_does_not_escape_into_the_card(manifest):
    """A stranger's manifest can be pushed on: no entry of the metadata, no heading and no HTML is of its making."""
    nasty = "x\n---\nlicense: mit\n# Free | <script>[a](b)\n```\n"
    evil = replace(
        manifest,
        name=nasty,
        device=nasty,
        versions={nasty: nasty},
        source=SourceRecord(nasty, nasty, {nasty: "0" * 64}),
        recipe={**manifest.recipe, "name": nasty, "source": {"bundled": nasty}},
    )
    text = model_card(evil, REPO, {"eval.json": Report(nasty, (nasty,), ((nasty,),))})
    data = ModelCard(text).data.to_dict()
    assert not {"license", "base_model"} & data.keys()
    assert sections(text).keys() == sections(model_card(manifest, REPO, {})).keys()
    assert not [line for line in text.splitlines() if line.startswith("# ") and "\\<script>" not in line]
