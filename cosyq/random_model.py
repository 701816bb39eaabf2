"""A checkpoint of random weights in the published layout: for tests, and for benchmarks without a download.

The weights are scaled so that activations keep the size they have in a trained network; what it speaks is noise.
A seed fixes every byte of every tensor, whatever the number of threads.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from cosyq.checkpoint.reader import QWEN, YAML
from cosyq.errors import CheckpointError
from cosyq.voices.voice import Voice

Shapes = dict[str, tuple[int, ...]]
TIME_WIDTH = 256
SPEECH_CODES, SPEECH_ROWS = 6561, 6761
MEL, SPEAKER = 80, 192
UPSAMPLE = ((8, 16), (5, 11), (3, 7))  # rate, kernel
RESBLOCK_KERNELS, SOURCE_KERNELS = (3, 7, 11), (7, 7, 11)
DILATIONS = 3
N_FFT = 16
PROMPT_TOKENS = 75
TABLES = ("embed_tokens.weight", "embedding.weight")  # what ids are looked up in


@dataclass(frozen=True)
class Size:
    """What differs between a full and a small checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int  # entries of vocab.json, before any special token
    text_rows: int
    dim: int
    depth: int
    dit_heads: int
    base_channels: int
    f0_channels: int


FULL = Size(896, 4864, 24, 14, 2, 151_643, 151_936, 1024, 22, 16, 512, 512)
SMALL = Size(64, 192, 3, 4, 2, 2_000, 2_304, 128, 3, 2, 64, 48)


def llm_shapes(size: Size) -> Shapes:
    """Published names and shapes of llm.pt, in its order."""
    h, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    shapes: Shapes = {"llm.model.model.embed_tokens.weight": (size.text_rows, h)}
    for index in range(size.layers):
        layer = f"llm.model.model.layers.{index}"
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, h)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (h, h)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (size.intermediate, h)
        shapes[f"{layer}.mlp.up_proj.weight"] = (size.intermediate, h)
        shapes[f"{layer}.mlp.down_proj.weight"] = (h, size.intermediate)
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
    shapes["llm.model.model.norm.weight"] = (h,)
    shapes["llm.model.lm_head.weight"] = (size.text_rows, h)
    shapes["llm_decoder.weight"] = (SPEECH_ROWS, h)
    shapes["speech_embedding.weight"] = (SPEECH_ROWS, h)
    return shapes


def flow_shapes(size: Size) -> Shapes:
    """Published names and shapes of flow.pt."""
    d = size.dim
    shapes: Shapes = {"input_embedding.weight": (SPEECH_CODES, MEL)}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    layer("spk_embed_affine_layer", MEL, SPEAKER)
    layer("pre_lookahead_layer.conv1", d, MEL, 4)
    layer("pre_lookahead_layer.conv2", MEL, d, 3)
    dit = "decoder.estimator"
    layer(f"{dit}.time_embed.time_mlp.0", d, TIME_WIDTH)
    layer(f"{dit}.time_embed.time_mlp.2", d, d)
    layer(f"{dit}.input_embed.proj", d, 4 * MEL)
    layer(f"{dit}.input_embed.conv_pos_embed.conv1.0", d, d // 16, 31)
    layer(f"{dit}.input_embed.conv_pos_embed.conv2.0", d, d // 16, 31)
    shapes[f"{dit}.rotary_embed.inv_freq"] = (32,)
    for index in range(size.depth):
        block = f"{dit}.transformer_blocks.{index}"
        layer(f"{block}.attn_norm.linear", 6 * d, d)
        for name in ("to_q", "to_k", "to_v"):
            layer(f"{block}.attn.{name}", 64 * size.dit_heads, d)
        layer(f"{block}.attn.to_out.0", d, 64 * size.dit_heads)
        layer(f"{block}.ff.ff.0.0", 2 * d, d)
        layer(f"{block}.ff.ff.2", d, 2 * d)
    layer(f"{dit}.norm_out.linear", 2 * d, d)
    layer(f"{dit}.proj_out", MEL, d)
    return shapes


def vocoder_shapes(size: Size) -> Shapes:
    """Published names and shapes of hift.pt, weight norm included."""
    shapes: Shapes = {"m_source.l_linear.weight": (1, 9), "m_source.l_linear.bias": (1,)}

    def normed(name: str, *shape: int) -> None:
        shapes[f"{name}.bias"] = shape[:1]
        shapes[f"{name}.parametrizations.weight.original0"] = (shape[0], 1, 1)
        shapes[f"{name}.parametrizations.weight.original1"] = shape

    def resblock(name: str, channels: int, kernel: int) -> None:
        for convs in ("convs1", "convs2"):
            for index in range(DILATIONS):
                normed(f"{name}.{convs}.{index}", channels, channels, kernel)
        for activations in ("activations1", "activations2"):
            for index in range(DILATIONS):
                shapes[f"{name}.{activations}.{index}.alpha"] = (channels,)

    base, stride = size.base_channels, math.prod(rate for rate, _ in UPSAMPLE)
    normed("conv_pre", base, MEL, 5)
    for index, (rate, kernel) in enumerate(UPSAMPLE):
        channels, stride = base >> (index + 1), stride // rate
        normed(f"ups.{index}", channels, base >> index, kernel)
        down = (channels, N_FFT + 2, 2 * stride if stride > 1 else 1)
        shapes[f"source_downs.{index}.weight"], shapes[f"source_downs.{index}.bias"] = down, (channels,)
        resblock(f"source_resblocks.{index}", channels, SOURCE_KERNELS[index])
        for number, kernel_size in enumerate(RESBLOCK_KERNELS):
            resblock(f"resblocks.{index * len(RESBLOCK_KERNELS) + number}", channels, kernel_size)
    normed("conv_post", N_FFT + 2, base >> len(UPSAMPLE), 7)
    for index in range(5):
        inputs, kernel = (MEL, 4) if index == 0 else (size.f0_channels, 3)
        normed(f"f0_predictor.condnet.{2 * index}", size.f0_channels, inputs, kernel)
    shapes["f0_predictor.classifier.weight"], shapes["f0_predictor.classifier.bias"] = (1, size.f0_channels), (1,)
    return shapes


def write_random(folder: Path, size: Size, seed: int) -> None:
    """Write the checkpoint, and a voice to try it with, as `folder`; it appears whole or not at all.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise CheckpointError("exists already", where=folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        (partial / QWEN).mkdir(parents=True)
        for name, shapes in (("llm", llm_shapes), ("flow", flow_shapes), ("hift", vocoder_shapes)):
            torch.save(_random_state(shapes(size), seed), partial / f"{name}.pt")
        (partial / YAML).write_text(_yaml(size), "utf-8")
        for name, text in _tokenizer_files(size).items():
            (partial / QWEN / name).write_text(text, "utf-8")
        (partial / "voice.safetensors").write_bytes(random_voice(seed).to_bytes())
        partial.rename(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"cannot be written ({str(error).splitlines()[0]})", where=folder) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _random_state(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(lambda name: _random_tensor(name, shapes[name], seed), shapes))
    state = dict(zip(shapes, drawn, strict=True))
    for name in [name for name in state if name.endswith("original0")]:
        direction = state[name.replace("original0", "original1")]
        state[name] = direction.norm(dim=(1, 2), keepdim=True)
    if "llm.model.lm_head.weight" in state:
        state["llm.model.lm_head.weight"] = state["llm.model.model.embed_tokens.weight"]  # tied
    return state


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    constants: tuple[tuple[str, Callable[[], Tensor]], ...] = (
        ("lm_head.weight", lambda: torch.empty(0)),  # tied below, not drawn
        ("inv_freq", lambda: 10000.0 ** -(torch.arange(0, 64, 2).float() / 64)),
        ("classifier.bias", lambda: torch.full(shape, 120.0)),  # Hz
        ("conv_post.bias", lambda: torch.full(shape, -3.0)),  # log magnitude
        ("norm.weight", lambda: torch.ones(shape)),
        ("alpha", lambda: torch.ones(shape)),
    )
    for ending, make in constants:
        if name.endswith(ending):
            return make()
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
    scale = 0.5 if name.endswith(TABLES) else 0.7 / math.sqrt(fan_in)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.empty(shape).normal_(0.0, scale, generator=generator)


def random_voice(seed: int) -> Voice:
    """A voice with a prompt of three seconds."""
    generator = torch.Generator().manual_seed(seed)
    return Voice(
        name="default",
        speaker=torch.randn(SPEAKER, generator=generator),
        prompt_tokens=torch.randint(0, SPEECH_CODES, (PROMPT_TOKENS,), generator=generator, dtype=torch.int32),
        prompt_mel=torch.randn(2 * PROMPT_TOKENS, MEL, generator=generator),
        transcript="Noise, made of nothing but chance.",
    )


def _merges(size: Size) -> Iterator[tuple[str, str]]:
    """All pairs of letters, then triples, then quadruples: a vocabulary of the real one's size and depth."""
    for length in (2, 3, 4):
        for letters in product(ascii_lowercase, repeat=length):
            yield "".join(letters[:-1]), letters[-1]


def _tokenizer_files(size: Size) -> dict[str, str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(size), size.vocab - len(alphabet)))
    vocab = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    added = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    stated = {str(len(vocab) + i): {"content": token, **flags} for i, token in enumerate(added)}
    config = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": size.text_rows,
    }
    return {
        "config.json": json.dumps(config, indent=1),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": stated, "tokenizer_class": "Qwen2Tokenizer"}),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(f"{a} {b}" for a, b in merges) + "\n",
    }


def _yaml(size: Size) -> str:
    return f"""\
# random weights in the published layout
sample_rate: 24000
spk_embed_dim: {SPEAKER}
token_mel_ratio: 2
chunk_size: 25
llm: !new:cosyvoice.llm.llm.CosyVoice3LM
    llm_input_size: {size.hidden}
    llm_output_size: {size.hidden}
    speech_token_size: {SPEECH_CODES}
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: 0.8
        top_k: 25
        win_size: 10
        tau_r: 0.1
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT
    input_size: {MEL}
    output_size: {MEL}
    spk_embed_dim: !ref <spk_embed_dim>
    vocab_size: {SPEECH_CODES}
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    pre_lookahead_layer: !new:cosyvoice.transformer.upsample_encoder.PreLookaheadLayer
        in_channels: {MEL}
        channels: {size.dim}
        pre_lookahead_len: 3
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: {3 * MEL}
        spk_emb_dim: {MEL}
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                inference_cfg_rate: 0.7
        estimator: !new:cosyvoice.flow.DiT.dit.DiT
            dim: {size.dim}
            depth: {size.depth}
            heads: {size.dit_heads}
            dim_head: 64
            ff_mult: 2
            mel_dim: {MEL}
            mu_dim: {MEL}
            spk_dim: {MEL}
            out_channels: {MEL}
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
hift: !new:cosyvoice.hifigan.generator.CausalHiFTGenerator
    in_channels: {MEL}
    base_channels: {size.base_channels}
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: {[rate for rate, _ in UPSAMPLE]}
    upsample_kernel_sizes: {[kernel for _, kernel in UPSAMPLE]}
    istft_params:
        n_fft: {N_FFT}
        hop_len: 4
    resblock_kernel_sizes: {list(RESBLOCK_KERNELS)}
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: {list(SOURCE_KERNELS)}
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    conv_pre_look_right: 4
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.CausalConvRNNF0Predictor
        in_channels: {MEL}
        cond_channels: {size.f0_channels}
"""
