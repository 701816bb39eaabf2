import json

import pytest
from conftest import GOLDEN

from cosyq.artifact.reader import open_artifact
from cosyq.text.tokenizer import TextTokenizer, assemble, parse_merges, special_tokens

EXPECTED = json.loads((GOLDEN / "expected_text_ids.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer(artifact_of):
    return open_artifact(artifact_of("int8")).tokenizer()


@pytest.mark.parametrize(("text", "ids"), list(zip(EXPECTED["texts"], EXPECTED["ids"], strict=True)))
def test_ids_equal_the_original(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


def test_vocabulary(tokenizer):
    assert tokenizer.end_of_prompt == EXPECTED["endofprompt"]
    assert len(tokenizer) == EXPECTED["n_tokens"]
    assert len(special_tokens()) == len(set(special_tokens())) == 280


def test_a_stated_id_that_comes_out_otherwise_is_an_error():
    stated = {"added_tokens_decoder": {"7": {"content": "<|endoftext|>"}}}
    with pytest.raises(ValueError, match="got id 2, its file says 7"):
        assemble({"a": 0, "b": 1}, [], stated)


def test_bad_merges():
    with pytest.raises(ValueError, match="line 2 is not a pair"):
        parse_merges("a b\nabc\n")
    with pytest.raises(ValueError, match="the vocabulary lacks"):
        assemble({"a": 0, "b": 1}, [("a", "b")], {})


@pytest.mark.parametrize("text", ["", "{}", "not json", "[" * 100_000])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextTokenizer(text)
