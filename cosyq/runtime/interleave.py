"""The language model's loop while text still arrives: five text ids, then fifteen speech ids, in turns.

The checkpoint was trained on this order as well (CosyVoice 2, arXiv 2412.10117). With `head` the system line up to
its marker, t the text ids and s the speech ids of recording and utterance together:

    sos, head, t0..t4, s0..s14, t5..t9, s15..s29, ..., the rest of t (none to four), task_id, the rest of s, eos

After fifteen speech ids the model says "fill", which it is not shown again; nothing else can come there, so it is not
asked. A recording has more than three speech ids to a text id, so its speech runs on beside the first words of the
text, and the first new speech comes when that is used up or the text ends.

It knows embeddings and ids; not text, voices, engines or audio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from cosyq.model.llm import KVCache, LanguageModel
from cosyq.runtime.decode import Sampler, decode, prefill

TEXT, SPEECH = 5, 15  # ids of a block

EmbedText = Callable[[list[int]], Tensor]  # ids -> [n, hidden] float32, where the language model is


@dataclass(frozen=True)
class Frame:
    """What an utterance goes on from, and how long it may get.

    head: text ids that come first, before any block.
    transcript, prompt: text ids and speech ids of the recording, possibly none.
    longest: text ids of the utterance at most.
    least, most: speech ids to a text id of the utterance; speech may not end before the text does.
    room: speech ids at most.
    """

    head: list[int]
    transcript: list[int]
    prompt: list[int]
    longest: int
    least: int
    most: int
    room: int

    @property
    def capacity(self) -> int:
        """Positions that the key-value cache must hold."""
        before = 2 + len(self.head) + len(self.transcript) + len(self.prompt)
        return before + self.longest + self.room

    def fits(self) -> bool:
        """Whether the recording is as the training's were: its transcript is through before its speech is."""
        return SPEECH * len(self.transcript) <= TEXT * len(self.prompt)


def interleave(
    llm: LanguageModel, embed_text: EmbedText, frame: Frame, text: Iterator[int], cache: KVCache, sampler: Sampler
) -> Iterator[int]:
    """Yield speech ids, waiting for `text` only when the next one needs it; the return value says how it ended.

    The cache is empty to begin with. Inference mode is entered for the network alone: whoever writes the text may be
    at work with torch too.
    """
    history: list[int] = []
    all_text, prompt = chain(frame.transcript, text), iter(frame.prompt)
    words = -len(frame.transcript)
    waiting = [_embed(llm, embed_text, [], [llm.config.sos]), _embed(llm, embed_text, frame.head, [])]
    while len(block := list(islice(all_text, TEXT))) == TEXT:
        words += TEXT
        shown = list(islice(prompt, SPEECH))
        waiting.append(_embed(llm, embed_text, block, shown))
        for _ in range(SPEECH - len(shown)):
            if len(history) == frame.room:
                return "length"  # type: ignore[return-value]
            logits = prefill(llm, torch.cat(waiting).unsqueeze(0), cache)
            token = sampler(logits.cpu(), history, False)
            yield token
            history.append(token)
            waiting = [_embed(llm, embed_text, [], [token])]
    words += len(block)
    waiting.append(_embed(llm, embed_text, block, [llm.config.task_id, *prompt]))
    minimum, maximum = (min(share * words, frame.room) for share in (frame.least, frame.most))
    last = torch.cat(waiting).unsqueeze(0)
    return (yield from decode(llm, last, cache, sampler, minimum=minimum, maximum=maximum, history=history))


@torch.inference_mode()
def _embed(llm: LanguageModel, embed_text: EmbedText, text: list[int], speech: list[int]) -> Tensor:
    """Text ids, then speech ids: [n, hidden] float32."""
    words = embed_text(text)
    spoken = torch.tensor(speech, dtype=torch.int64, device=words.device)
    return torch.cat([words, llm.embed_speech(spoken)])
