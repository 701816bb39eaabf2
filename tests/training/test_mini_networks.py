"""What is trained is what speaks: the training networks against cosyq's own, over an exported checkpoint."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative
from torch import nn

from cosyq.checkpoint.reader import QWEN, open_checkpoint, open_stage
from cosyq.model.flow import Flow, time_steps
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.model.vocoder import StreamState, Vocoder, excitation_noise
from cosyq.text.tokenizer import TextTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # the training code is not part of the package

from training.mini import config as mini
from training.mini import layout
from training.mini.networks.flow import FlowMatching
from training.mini.networks.llm import SpeechLM
from training.mini.networks.vocoder import HiFT
from training.mini.speak import load_networks

STEPS = 10


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """Random weights, nothing left at the zeros it starts from, rounded to what the files hold."""
    torch.manual_seed(0)
    made = {
        "llm": SpeechLM(mini.MINI.llm),
        "flow": FlowMatching(mini.MINI.flow, mini.TIME_WIDTH),
        "hift": HiFT(mini.MINI.vocoder),
    }
    for network in made.values():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        network.load_state_dict(layout.half(network.state_dict()))
        network.eval()
    return made


@pytest.fixture(scope="module")
def checkpoint(networks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    layout.write_weights(folder, {name: network.state_dict() for name, network in networks.items()})
    layout.write_yaml(folder, mini.MINI)
    words = [f"the {a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnrst"]
    layout.write_tokenizer(folder / QWEN, *layout.train_bpe(words, 300), mini.MINI.llm)
    return folder


@pytest.fixture(scope="module")
def speaking(checkpoint) -> tuple[LanguageModel, Flow, Vocoder]:
    loaded = load_networks(checkpoint, steps=STEPS)
    return loaded.llm, loaded.flow, loaded.vocoder


def test_the_exported_checkpoint_describes_itself(checkpoint):
    opened = open_checkpoint(checkpoint)
    assert opened.config == mini.MINI
    assert "<|endofprompt|>" in opened.tokenizer
    tokenizer = TextTokenizer(opened.tokenizer)
    assert tokenizer.encode("the bat<|endofprompt|>")[-1] == tokenizer.end_of_prompt
    for stage in ("llm", "flow", "vocoder"):
        open_stage(opened, stage, steps=(STEPS,))  # raises when a tensor is missing, misshapen or too many


def test_it_fits_the_repository(checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) < 28e6
    assert max(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) < 16e6


@torch.inference_mode()
def test_language_model(networks, checkpoint, speaking):
    trained, spoken = networks["llm"], speaking[0]
    c = mini.MINI.llm
    text, speech = torch.randint(0, c.text_rows, (1, 12)), torch.randint(0, c.speech_vocab, (1, 30))
    ids = torch.cat([torch.tensor([[c.sos]]), text, torch.tensor([[c.task_id]]), speech], dim=1)
    is_text = torch.zeros_like(ids, dtype=torch.bool)
    is_text[:, 1:13] = True
    found = trained.llm_decoder(trained(ids, is_text))

    marked = spoken.embed_speech(ids.where(~is_text, 0))
    words = trained.backbone.embed_tokens(text)
    embeddings = torch.cat([marked[:, :1], words, marked[:, 13:]], dim=1)
    cache = KVCache.empty(c, ids.shape[1], device=torch.device("cpu"), dtype=torch.float32)
    expected = spoken.logits(spoken(embeddings, cache))
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("streaming", [False, True])
@torch.inference_mode()
def test_flow(networks, speaking, streaming):
    """The solver over the training network, prompt and guidance included, against the inference one."""
    trained, spoken = networks["flow"], speaking[1]
    c = mini.MINI.flow
    tokens, speaker = torch.randint(0, c.vocab, (40,)), torch.randn(c.speaker_dim)
    prompt, noise = torch.randn(16, c.mel_dim), torch.randn(80, c.mel_dim)
    given = torch.zeros(1, 80, c.mel_dim)
    given[0, :16] = prompt
    condition = trained.condition(tokens[None], speaker[None], given)
    x = noise[None]
    for t, dt in zip(*time_steps(STEPS), strict=True):
        at = torch.tensor([t])
        guided = trained.velocity(x, condition, at, streaming=streaming)
        free = trained.velocity(x, torch.zeros_like(condition), at, streaming=streaming)
        x = x + dt * ((1 + c.guidance) * guided - c.guidance * free)
    expected = spoken(tokens, speaker, prompt, noise, streaming=streaming, final=True, steps=STEPS)
    assert relative(x[0, 16:].T, expected) < 1e-3


@torch.no_grad()
def test_vocoder(networks, speaking):
    trained, spoken = networks["hift"], speaking[2]
    c, frames = mini.MINI.vocoder, 24
    mel = torch.randn(1, c.mel_dim, frames)
    noise = excitation_noise(0, frames, c.harmonics + 1, c.samples_per_frame)
    expected = spoken.render(mel, StreamState(), final=True)
    exact = copy.deepcopy(trained.f0_predictor).double()  # as the inference network computes it
    pitch = exact(mel.double()).float()
    found = trained(mel, pitch, noise[None])
    assert expected.abs().max() > 1e-3
    assert relative(found, expected) < 1e-4


def test_every_parameter_learns(networks):
    """A gradient reaches everything but the pitch in the waveform, which is learnt by itself."""
    c = mini.MINI
    mel = torch.randn(2, 20, c.flow.mel_dim)
    tokens, speaker = torch.randint(0, c.flow.vocab, (2, 10)), torch.randn(2, c.flow.speaker_dim)
    networks["flow"].loss(tokens, speaker, mel, torch.zeros_like(mel), streaming=True).backward()
    f0 = networks["hift"].f0_predictor(mel.mT)
    noise = torch.rand(2, 20 * c.vocoder.samples_per_frame, c.vocoder.harmonics + 1)
    networks["hift"](mel.mT, f0.detach(), noise).square().mean().backward()
    f0.sum().backward()
    for name in ("flow", "hift"):
        idle = [path for path, p in networks[name].named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle, f"{name}: {idle}"


def test_the_flow_is_told_when_it_goes_beyond_its_bounds():
    """At the start nothing is; a modulation that ran away is, and its gradient leads back."""
    torch.manual_seed(0)
    c = mini.MINI.flow
    flow = FlowMatching(c, mini.TIME_WIDTH)
    mel, tokens = torch.randn(1, 20, c.mel_dim), torch.randint(0, c.vocab, (1, 10))
    given = tokens, torch.randn(1, c.speaker_dim), mel, torch.zeros_like(mel)
    flow.loss(*given, streaming=False)
    assert flow.excess() == 0
    modulation = flow.decoder["estimator"].transformer_blocks[0].attn_norm
    nn.init.constant_(modulation.linear.bias, 50.0)
    flow.loss(*given, streaming=False)
    assert flow.excess() > 40
    modulation.excess.backward()
    assert (modulation.linear.bias.grad > 0).all()
