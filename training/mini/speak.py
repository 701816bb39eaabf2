"""A checkpoint folder, straight into the networks that inference uses: to hear a slice before it is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cosyq.checkpoint.reader import open_checkpoint, open_stage
from cosyq.model.config import ModelConfig
from cosyq.model.flow import Flow, start_noise
from cosyq.model.inventory import Stage, inventory
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.model.vocoder import StreamState, Vocoder
from cosyq.runtime.decode import decode
from cosyq.runtime.sampling import draws, sample
from cosyq.text.prompt import compose
from cosyq.text.tokenizer import TextTokenizer
from cosyq.voices.voice import Voice

SPEECH_PER_TEXT = (2, 20)  # bounds, as in the synthesizer


@dataclass(frozen=True)
class Spoken:
    """samples [n] float32 on the host; `finish` is "stop", or "length" where the model ran away."""

    samples: Tensor
    tokens: int
    finish: str


@dataclass(frozen=True)
class Networks:
    config: ModelConfig
    tokenizer: TextTokenizer
    text_embedding: Tensor
    llm: LanguageModel
    flow: Flow
    vocoder: Vocoder
    steps: int

    @property
    def device(self) -> torch.device:
        return self.text_embedding.device

    @torch.inference_mode()
    def speech_tokens(self, text: str, voice: Voice, seed: int) -> tuple[list[int], str]:
        """Speech ids for one sentence, and how they ended."""
        c = self.config
        (prompted,) = compose(text, voice.transcript, self.tokenizer)
        prompt = voice.prompt_tokens.tolist() if prompted.with_speech else []
        ids = torch.tensor([c.llm.sos, c.llm.task_id, *prompt], device=self.device)
        speech = self.llm.embed_speech(ids)
        words = self.text_embedding[torch.tensor(prompted.prompt + prompted.words, device=self.device)]
        embeddings = torch.cat([speech[:1], words, speech[1:]])[None]
        least, most = (bound * len(prompted.words) for bound in SPEECH_PER_TEXT)
        cache = KVCache.empty(c.llm, embeddings.shape[1] + most, device=self.device, dtype=torch.float32)
        uniform = draws(most, torch.Generator().manual_seed(seed))

        def sampler(logits: Tensor, history: Sequence[int], may_stop: bool) -> int:
            forbidden = None if may_stop else c.llm.speech_vocab
            return sample(logits, history, c.sampling, uniform[len(history)], forbid_from=forbidden)

        stream = decode(self.llm, embeddings, cache, sampler, minimum=least, maximum=most)
        tokens: list[int] = []
        while True:
            try:
                tokens.append(next(stream))
            except StopIteration as end:
                return tokens, end.value

    @torch.inference_mode()
    def render(self, tokens: list[int], voice: Voice) -> Tensor:
        """Speech ids -> samples [n] on the host."""
        ids = torch.cat([voice.prompt_tokens.long(), torch.tensor(tokens)]).to(self.device)
        noise = start_noise(self.config.flow).to(self.device)
        mel = self.flow(
            ids,
            voice.speaker.to(self.device),
            voice.prompt_mel.to(self.device),
            noise,
            streaming=False,
            final=True,
            steps=self.steps,
        )
        return self.vocode(mel)

    @torch.inference_mode()
    def vocode(self, mel: Tensor) -> Tensor:
        """mel [mel, frames] -> samples [n] on the host."""
        return self.vocoder.render(mel[None], StreamState(), final=True)[0].cpu()

    def speak(self, text: str, voice: Voice, seed: int = 0) -> Spoken:
        tokens, finish = self.speech_tokens(text, voice, seed)
        return Spoken(self.render(tokens, voice), len(tokens), finish)


def load_networks(folder: Path, *, steps: int = 10, device: str = "cpu") -> Networks:
    """Read a checkpoint in the published layout with the project's own reader, unquantized, in float32."""
    checkpoint = open_checkpoint(folder)
    c = checkpoint.config
    made = {"llm": LanguageModel(c.llm), "flow": Flow(c.flow, (steps,)), "vocoder": Vocoder(c.vocoder)}
    embedding = torch.empty(0)
    stages: tuple[Stage, ...] = ("llm", "flow", "vocoder")
    for stage in stages:
        source = open_stage(checkpoint, stage, steps=(steps,))
        state = {}
        for module in inventory(stage, c, steps=(steps,)):
            for parameter in module.parameters:
                value = source.read(module, parameter).float()
                if module.path == "text_embedding":
                    embedding = value.to(device)
                else:
                    state[f"{module.path}.{parameter}" if module.path else parameter] = value
        made[stage].load_state_dict(state)
        made[stage].to(device).eval()
    return Networks(c, TextTokenizer(checkpoint.tokenizer), embedding, steps=steps, **made)  # type: ignore[arg-type]
