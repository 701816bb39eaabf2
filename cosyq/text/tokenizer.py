"""Qwen2's byte-level BPE with CosyVoice 3's own tokens, as one `tokenizers` file.

At build time the published vocab.json, merges.txt and tokenizer_config.json become one tokenizer.json;
at run time only that is read. transformers is not needed for either.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

FILE_NAME = "tokenizer.json"
END_OF_PROMPT = "<|endofprompt|>"

# Qwen2's split of text into words, as published with its tokenizer.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens() -> list[str]:
    """CosyVoice 3's special tokens, in the order in which they are appended to the vocabulary."""
    return resources.files("cosyq.text").joinpath("special_tokens.txt").read_text("utf-8").split()


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]], tokenizer_config: dict[str, Any]) -> str:
    """The published tokenizer files as one tokenizer.json.

    Raises:
        ValueError: the files contradict each other.
    """
    unusable = next((pair for pair in merges if pair[0] + pair[1] not in vocab), None)
    if unusable:
        raise ValueError(f"merge {unusable} makes a token that the vocabulary lacks")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    stated = tokenizer_config.get("added_tokens_decoder", {})
    for number, entry in sorted(stated.items(), key=lambda item: int(item[0])):
        flags = {k: bool(entry.get(k, False)) for k in ("lstrip", "rstrip", "single_word", "normalized")}
        tokenizer.add_special_tokens([AddedToken(entry["content"], special=True, **flags)])
        found = tokenizer.token_to_id(entry["content"])
        if found != int(number):
            raise ValueError(f"{entry['content']} got id {found}, its file says {number}")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens()])
    return tokenizer.to_str(pretty=False)


def parse_merges(text: str) -> list[tuple[str, str]]:
    """merges.txt: a pair a line, a `#version` line allowed in front.

    Raises:
        ValueError: a line is not a pair.
    """
    pairs = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"line {number} is not a pair of pieces: {line[:40]!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


class TextTokenizer:
    """Text to ids, special tokens recognised."""

    def __init__(self, serialized: str):
        """Raises ValueError when `serialized` is not a tokenizer.json that knows `<|endofprompt|>`."""
        try:
            self._tokenizer = Tokenizer.from_str(serialized)
        except Exception as error:  # the Rust side raises bare Exception for any malformed file
            raise ValueError(f"not a tokenizer.json: {error}") from None
        found = self._tokenizer.token_to_id(END_OF_PROMPT)
        if found is None:
            raise ValueError(f"the tokenizer has no {END_OF_PROMPT} token")
        self.end_of_prompt: int = found

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
