"""The language model's loop while text still arrives: five text ids, then fifteen speech ids, in turns.

The checkpoint was trained on this order as well (CosyVoice 2, arXiv 2412.10117). With `head` the system line up to
its marker, t the text ids and s the speech ids of recording and utterance together:

    sos, head, t0..t4, s0..s14, t5..t9, s15..s29, ..., the rest of t (none to four), task_id, the rest of s, eos

After fifteen speech ids the model says "fill", which it is not shown again; nothing else can come there, so it is not
asked. A recording has more than three speech ids to a text id, so its speech runs on beside the first words of the
text, and the first new speech comes when that is used up or the text ends.

It knows ids; not text, networks or audio.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from cosyq.runtime.decode import Part

TEXT, SPEECH = 5, 15  # ids of a block


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
    def positions(self) -> int:
        """Ids that are shown at most, without those that were drawn, but for the last of each part, shown again."""
        before = 2 + len(self.head) + len(self.transcript) + len(self.prompt)
        return before + self.longest

    def fits(self) -> bool:
        """Whether the recording is as the training's were: its transcript is through before its speech is."""
        return SPEECH * len(self.transcript) <= TEXT * len(self.prompt)


def interleaved(frame: Frame, text: Iterator[int], *, sos: int, task_id: int) -> Iterator[Part]:
    """The parts of an utterance, waiting for `text` only when the next one needs it."""
    all_text, prompt = chain(frame.transcript, text), iter(frame.prompt)
    words, drawn = -len(frame.transcript), 0
    shown: list[tuple[list[int], list[int]]] = [([], [sos]), (frame.head, [])]
    while len(block := list(islice(all_text, TEXT))) == TEXT:
        words += TEXT
        spoken = list(islice(prompt, SPEECH))
        shown.append((block, spoken))
        if len(spoken) < SPEECH:
            drawn = min(drawn + SPEECH - len(spoken), frame.room)
            yield Part(tuple(shown), drawn, drawn)
            if drawn == frame.room:
                return
            shown = []
    words += len(block)
    shown.append((block, [task_id, *prompt]))
    minimum, maximum = (min(share * words, frame.room) for share in (frame.least, frame.most))
    yield Part(tuple(shown), minimum, maximum)


def whole(text: list[int], prompt: list[int], *, minimum: int, maximum: int, sos: int, task_id: int) -> Part:
    """The one part of an utterance whose text is there: all of it, then the recording's speech ids."""
    return Part((([], [sos]), (text, [task_id, *prompt])), minimum, maximum)
