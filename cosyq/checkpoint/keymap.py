"""The published tensor names and ours, as data.

Each rule is (pattern of a published name, our name, or None for a tensor that inference does not need).
The first rule that matches the whole name decides; a name that no rule matches is an error.
"""

from __future__ import annotations

import re

Rules = tuple[tuple[str, str | None], ...]

LLM: Rules = (
    (r"llm\.model\.model\.embed_tokens\.weight", "text_embedding.weight"),
    (r"llm\.model\.model\.(layers\.\d+\..+|norm\.weight)", r"\1"),
    (r"llm\.model\.lm_head\.weight", None),  # predicts text; tied to embed_tokens, never used for speech
    (r"llm_decoder\.weight", "head.weight"),
    (r"speech_embedding\.weight", r"speech_embedding.weight"),
)

# The AdaLN projections become tables; their own names stay under `adaln.` until `fold` consumes them.
FLOW: Rules = (
    (r"input_embedding\.weight", "token_embedding.weight"),
    (r"spk_embed_affine_layer\.(weight|bias)", r"speaker_proj.\1"),
    (r"pre_lookahead_layer\.(conv[12]\..+)", r"token_encoder.\1"),
    (r"decoder\.estimator\.time_embed\.time_mlp\.([02]\..+)", r"adaln.time.\1"),
    (r"decoder\.estimator\.transformer_blocks\.(\d+)\.attn_norm\.linear\.(weight|bias)", r"adaln.blocks.\1.\2"),
    (r"decoder\.estimator\.norm_out\.linear\.(weight|bias)", r"adaln.out.\1"),
    (r"decoder\.estimator\.rotary_embed\.inv_freq", "estimator.rope_frequencies"),
    (r"decoder\.estimator\.input_embed\.proj\.(.+)", r"estimator.input_proj.\1"),
    (r"decoder\.estimator\.input_embed\.conv_pos_embed\.(conv[12])\.0\.(.+)", r"estimator.conv_pos.\1.\2"),
    (r"decoder\.estimator\.transformer_blocks\.(\d+)\.attn\.(to_[qkv])\.(.+)", r"estimator.blocks.\1.attn.\2.\3"),
    (r"decoder\.estimator\.transformer_blocks\.(\d+)\.attn\.to_out\.0\.(.+)", r"estimator.blocks.\1.attn.to_out.\2"),
    (r"decoder\.estimator\.transformer_blocks\.(\d+)\.ff\.ff\.0\.0\.(.+)", r"estimator.blocks.\1.ff.up.\2"),
    (r"decoder\.estimator\.transformer_blocks\.(\d+)\.ff\.ff\.2\.(.+)", r"estimator.blocks.\1.ff.down.\2"),
    (r"decoder\.estimator\.proj_out\.(.+)", r"estimator.proj_out.\1"),
)

VOCODER: Rules = (
    (r"m_source\.l_linear\.(weight|bias)", r"source.linear.\1"),
    (r"f0_predictor\.condnet\.(\d+)\.(.+)", r"f0_predictor.convs.\1.\2"),  # indices count the ELUs too
    (r"f0_predictor\.classifier\.(.+)", r"f0_predictor.classifier.\1"),
    (r"(conv_pre|conv_post|ups\.\d+|source_downs\.\d+|(?:source_)?resblocks\.\d+\..+)\.([^.]+)", r"\1.\2"),
)


def rename(name: str, rules: Rules) -> str | None:
    """Our name for a published one, None when it is not needed.

    Raises:
        KeyError: no rule knows the name.
    """
    for pattern, ours in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours) if ours is not None else None
    raise KeyError(name)


def plain_vocoder_name(name: str) -> str:
    """Undo the spellings under which hift.pt is found: a `generator.` prefix, two kinds of weight norm.

    The F0 predictor's convolutions sit between activations; only every other index is a layer.
    """
    name = name.removeprefix("generator.")
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    return re.sub(r"(?<=condnet\.)(\d+)", lambda m: str(int(m[1]) // 2) if int(m[1]) % 2 == 0 else m[1] + "!", name)
