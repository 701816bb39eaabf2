"""When to render: the generated-token counts at which a stream hands a chunk to the flow.

The flow's attention is block-causal, its blocks counted from the start of the prompt. A chunk that ends where
a block ends is final; one that ends elsewhere would be rendered again. The first chunk is what the prompt left
of its last block, later ones grow, because each one costs the flow a pass over all that came before.
"""

from __future__ import annotations

from collections.abc import Iterator

GROWTH = 2
LARGEST = 4  # blocks


def chunk_ends(prompt_tokens: int, block: int) -> Iterator[int]:
    """Counts of generated tokens, rising without end, each with prompt + count a multiple of `block`."""
    end = block - prompt_tokens % block
    blocks = 1
    while True:
        yield end
        end += blocks * block
        blocks = min(blocks * GROWTH, LARGEST)
