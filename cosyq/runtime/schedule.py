"""When to render: the generated-token counts at which a stream hands a chunk to the flow.

The flow's attention is block-causal, its blocks counted from the start of the prompt. A chunk that ends where
a block ends is final; one that ends elsewhere would be rendered again. The first chunk is what the prompt left
of its last block, so a stream shows the flow as much of the prompt's end as leaves it a short one; the language model
sees it whole. Later chunks grow, because each one costs the flow a pass over all that came before; by how much is the
engine's to say, which must have made a chunk while the one before it is heard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FIRST = 0.4  # of a block: ten of the published 25 tokens, and the look-ahead's three


@dataclass(frozen=True)
class Growth:
    """Behind the first, chunks of 1, `factor`, `factor`² ... blocks, but at most `largest`."""

    factor: int
    largest: int


def shown_prompt(prompt_tokens: int, block: int) -> int:
    """How many of a prompt's last tokens a stream shows the flow: all but what its first chunk would be longer for.

    A prompt that is shorter than the rest of the first block is shown whole.
    """
    before = block - round(FIRST * block)
    return prompt_tokens if prompt_tokens < before else prompt_tokens - (prompt_tokens - before) % block


def chunk_ends(prompt_tokens: int, block: int, growth: Growth) -> Iterator[int]:
    """Counts of generated tokens, rising without end, each with prompt + count a multiple of `block`."""
    end = block - prompt_tokens % block
    blocks = 1
    while True:
        yield end
        end += blocks * block
        blocks = min(blocks * growth.factor, growth.largest)
