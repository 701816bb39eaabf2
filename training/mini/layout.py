"""The published layout: cosyvoice3.yaml, the tokenizer's files and the weights' .safetensors twins."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from cosyq.checkpoint.reader import QWEN_FILES, YAML
from cosyq.model.config import FlowConfig, LLMConfig, ModelConfig, VocoderConfig
from cosyq.text.tokenizer import QWEN2_WORDS, TextTokenizer, assemble, parse_merges

STATED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything in float16, which keeps eight times more of a small weight than bfloat16 at the same size.

    The F0 predictor stays float32: its pitch is summed up into a phase.

    Raises:
        ValueError: a weight is not finite, or does not fit.
    """
    result = {}
    for name, tensor in state.items():
        exact = name.startswith("f0_predictor.") or name.endswith("inv_freq")
        result[name] = tensor.detach().cpu().to(torch.float32 if exact else torch.float16).contiguous()
        if not torch.isfinite(result[name]).all():
            raise ValueError(f"{name} does not fit into float16")
    return result


def write_weights(folder: Path, states: dict[str, dict[str, Tensor]]) -> None:
    """`states`: llm, flow and hift, each by its published names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        save_file(half(state), folder / f"{name}.safetensors")


def train_bpe(sentences: list[str], entries: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """vocab.json and merges of a byte-level BPE that splits words as Qwen2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=entries, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], c: LLMConfig) -> None:
    """The four files of CosyVoice-BlankEN/."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    stated = {str(len(vocab) + i): {"content": token, **flags} for i, token in enumerate(STATED_TOKENS)}
    qwen = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "model_type": "qwen2",
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": True,
        "vocab_size": c.text_rows,
    }
    texts = {
        "config.json": json.dumps(qwen, indent=1),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": stated, "tokenizer_class": "Qwen2Tokenizer"}),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(f"{a} {b}" for a, b in merges) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in QWEN_FILES:
        (folder / name).write_text(texts[name] + ("" if texts[name].endswith("\n") else "\n"), "utf-8")


def read_text_tokenizer(folder: Path, dropout: float = 0.0) -> TextTokenizer:
    """The tokenizer that the checkpoint's reader will make of the files.

    `dropout` leaves out that share of the merges, at random every time, so that a word is spelt in many ways
    (BPE-dropout, arXiv 1910.13267).
    """
    stated = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    serialized = assemble(vocab, parse_merges((folder / "merges.txt").read_text("utf-8")), stated)
    if dropout:
        tree = json.loads(serialized)
        tree["model"]["dropout"] = dropout
        serialized = json.dumps(tree)
    return TextTokenizer(serialized)


def write_yaml(folder: Path, config: ModelConfig) -> None:
    text = _HEAD.format(c=config.flow) + _llm(config) + _flow(config.flow) + _hift(config.vocoder)
    (folder / YAML).write_text(text, "utf-8")


_HEAD = """\
# cosyq-mini: Fun-CosyVoice3's layout and architecture in small
sample_rate: 24000
spk_embed_dim: {c.speaker_dim}
token_frame_rate: 25
token_mel_ratio: {c.token_mel_ratio}
chunk_size: 25
silent_tokens: []
num_decoding_left_chunks: -1
"""


def _llm(config: ModelConfig) -> str:
    c, s = config.llm, config.sampling
    return f"""\
llm: !new:cosyvoice.llm.llm.CosyVoice3LM
    llm_input_size: {c.hidden_size}
    llm_output_size: {c.hidden_size}
    speech_token_size: {c.speech_vocab}
    length_normalized_loss: True
    lsm_weight: 0
    mix_ratio: [5, 15]
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: CosyVoice-BlankEN
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: {s.top_p}
        top_k: {s.top_k}
        win_size: {s.win_size}
        tau_r: {s.tau_r}
"""


def _flow(c: FlowConfig) -> str:
    return f"""\
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT
    input_size: {c.token_dim}
    output_size: {c.mel_dim}
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: {c.vocab}
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: {c.lookahead}
    pre_lookahead_layer: !new:cosyvoice.transformer.upsample_encoder.PreLookaheadLayer
        in_channels: {c.token_dim}
        channels: {c.lookahead_channels}
        pre_lookahead_len: {c.lookahead}
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: {3 * c.mel_dim}
        n_spks: 1
        spk_emb_dim: {c.mel_dim}
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: {c.guidance}
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.DiT.dit.DiT
            dim: {c.dim}
            depth: {c.depth}
            heads: {c.heads}
            dim_head: {c.head_dim}
            ff_mult: {c.ff_dim // c.dim}
            mel_dim: {c.mel_dim}
            mu_dim: {c.token_dim}
            spk_dim: {c.mel_dim}
            out_channels: {c.mel_dim}
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>
"""


def _hift(c: VocoderConfig) -> str:
    return f"""\
hift: !new:cosyvoice.hifigan.generator.CausalHiFTGenerator
    in_channels: {c.mel_dim}
    base_channels: {c.base_channels}
    nb_harmonics: {c.harmonics}
    sampling_rate: !ref <sample_rate>
    nsf_alpha: {c.sine_amp}
    nsf_sigma: {c.noise_std}
    nsf_voiced_threshold: {c.voiced_threshold:g}
    upsample_rates: {list(c.upsample_rates)}
    upsample_kernel_sizes: {list(c.upsample_kernels)}
    istft_params:
        n_fft: {c.n_fft}
        hop_len: {c.hop}
    resblock_kernel_sizes: {list(c.resblock_kernels)}
    resblock_dilation_sizes: {[list(row) for row in c.resblock_dilations]}
    source_resblock_kernel_sizes: {list(c.source_kernels)}
    source_resblock_dilation_sizes: {[list(row) for row in c.source_dilations]}
    lrelu_slope: {c.lrelu_slope}
    audio_limit: {c.audio_limit}
    conv_pre_look_right: {c.lookahead}
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.CausalConvRNNF0Predictor
        num_class: 1
        in_channels: {c.mel_dim}
        cond_channels: {c.f0_channels}
"""
