"""The model's dimensions, read from cosyvoice3.yaml, the Qwen2 config and the tensors' own shapes."""

from __future__ import annotations

from typing import Any

from cosyq.checkpoint import hyperyaml
from cosyq.checkpoint.tensors import LazyTensor
from cosyq.model.config import FlowConfig, LLMConfig, SamplingConfig, VocoderConfig

Shapes = dict[str, LazyTensor]

# Pauses, breaths and silence among the codes of speech_tokenizer_v3. The published files do not name them (the
# original's code does); a checkpoint with a tokenizer of its own lists them as `silent_tokens` in its yaml.
SILENT_TOKENS = (1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323)


def describe_llm(yaml: dict[str, Any], qwen: dict[str, Any], tensors: Shapes) -> LLMConfig:
    """Raises KeyError or ValueError when a size is missing or not a number."""
    heads = _int(qwen, "num_attention_heads")
    rope = qwen.get("rope_parameters") or {}  # transformers 5 moved rope_theta here
    return LLMConfig(
        hidden_size=_int(qwen, "hidden_size"),
        intermediate_size=_int(qwen, "intermediate_size"),
        num_layers=_int(qwen, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_int(qwen, "num_key_value_heads"),
        head_dim=int(qwen.get("head_dim") or _int(qwen, "hidden_size") // heads),
        rope_theta=float(rope.get("rope_theta") or qwen.get("rope_theta", 10000.0)),
        rms_norm_eps=float(qwen["rms_norm_eps"]),
        text_rows=_shape(tensors, "text_embedding.weight", 2)[0],
        speech_vocab=int(hyperyaml.lookup(yaml, "llm.speech_token_size")),
        speech_rows=_shape(tensors, "speech_embedding.weight", 2)[0],
        silent_tokens=tuple(int(token) for token in yaml.get("silent_tokens", SILENT_TOKENS)),
    )


def describe_sampling(yaml: dict[str, Any]) -> SamplingConfig:
    def get(key: str) -> Any:
        return hyperyaml.lookup(yaml, f"llm.sampling.{key}")

    return SamplingConfig(float(get("top_p")), int(get("top_k")), int(get("win_size")), float(get("tau_r")))


def describe_flow(yaml: dict[str, Any], tensors: Shapes) -> FlowConfig:
    def get(key: str) -> Any:
        return hyperyaml.lookup(yaml, f"flow.{key}")

    def estimator(key: str) -> int:
        return int(get(f"decoder.estimator.{key}"))

    dim = estimator("dim")
    _, group_width, kernel = _shape(tensors, "estimator.conv_pos.conv1.weight", 3)
    return FlowConfig(
        vocab=int(get("vocab_size")),
        token_dim=int(get("input_size")),
        mel_dim=int(get("output_size")),
        speaker_dim=int(get("spk_embed_dim")),
        token_mel_ratio=int(get("token_mel_ratio")),
        lookahead=int(get("pre_lookahead_len")),
        lookahead_channels=int(get("pre_lookahead_layer.channels")),
        dim=dim,
        depth=estimator("depth"),
        heads=estimator("heads"),
        head_dim=estimator("dim_head"),
        ff_dim=dim * estimator("ff_mult"),
        conv_kernel=kernel,
        conv_groups=dim // max(group_width, 1),
        chunk_frames=estimator("static_chunk_size"),
        guidance=float(get("decoder.cfm_params.content.inference_cfg_rate")),
    )


def describe_vocoder(yaml: dict[str, Any], tensors: Shapes) -> VocoderConfig:
    def get(key: str) -> Any:
        return hyperyaml.lookup(yaml, f"hift.{key}")

    def ints(key: str) -> tuple[int, ...]:
        return tuple(int(v) for v in get(key))

    def lists(key: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(v) for v in row) for row in get(key))

    layers = sum(name.startswith("f0_predictor.convs.") and name.endswith(".weight_v") for name in tensors)
    if layers == 0:
        raise KeyError("f0_predictor.condnet")
    return VocoderConfig(
        mel_dim=int(get("in_channels")),
        base_channels=int(get("base_channels")),
        harmonics=int(get("nb_harmonics")),
        sample_rate=int(get("sampling_rate")),
        sine_amp=float(get("nsf_alpha")),
        noise_std=float(get("nsf_sigma")),
        voiced_threshold=float(get("nsf_voiced_threshold")),
        upsample_rates=ints("upsample_rates"),
        upsample_kernels=ints("upsample_kernel_sizes"),
        n_fft=int(get("istft_params.n_fft")),
        hop=int(get("istft_params.hop_len")),
        resblock_kernels=ints("resblock_kernel_sizes"),
        resblock_dilations=lists("resblock_dilation_sizes"),
        source_kernels=ints("source_resblock_kernel_sizes"),
        source_dilations=lists("source_resblock_dilation_sizes"),
        lrelu_slope=float(get("lrelu_slope")),
        audio_limit=float(get("audio_limit")),
        lookahead=int(get("conv_pre_look_right")),
        f0_channels=int(get("f0_predictor.cond_channels")),
        f0_kernels=tuple(_shape(tensors, f"f0_predictor.convs.{i}.weight_v", 3)[2] for i in range(layers)),
    )


def _int(mapping: dict[str, Any], key: str) -> int:
    return int(mapping[key])


def _shape(tensors: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = tensors[name].shape
    if len(shape) != rank:
        raise ValueError(f"{tensors[name].names[0]} has shape {list(shape)}, expected {rank} dimensions")
    return shape
