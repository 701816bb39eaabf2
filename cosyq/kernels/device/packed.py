"""Tiles of packed weights, fetched and decoded."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels import packed

INT8_STEP = tl.constexpr(7.874015718698502e-3)  # as `quantize.formats` has it
NESTED_BLOCKS = tl.constexpr(packed.NESTED_BLOCKS)
LEVELS = tl.constexpr(packed.LEVELS)


@triton.jit
def fetch(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, k0: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
          KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Codes of `rows` [r] from column k0 on, and their scales.

    [r, WIDTH] and [r], or of 4 bits [r, blocks, BLOCK / 2] and [r, blocks].
    """
    if (KIND == 0) or (KIND == 3):
        k = k0 + tl.arange(0, WIDTH)
        inside = valid[:, None] & (k < K)[None, :]
        codes = tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0)
        if KIND == 0:
            scales = tl.load(scale_ptr + rows, mask=valid, other=0.0) * INT8_STEP
        else:
            scales = valid.to(tl.float32)
        return codes, scales
    else:
        blocks: tl.constexpr = WIDTH // BLOCK
        block = k0 // BLOCK + tl.arange(0, blocks)
        inside = valid[:, None] & (block < K // BLOCK)[None, :]
        index = rows.to(tl.int64)[:, None] * (K // BLOCK) + block[None, :]
        byte = tl.arange(0, BLOCK // 2)
        codes = tl.load(
            w_ptr + index[:, :, None] * (BLOCK // 2) + byte[None, None, :], mask=inside[:, :, None], other=0
        )
        return codes, _block_scales(scale_ptr, group_ptr, code_ptr, index, inside, KIND)


@triton.jit
def _block_scales(scale_ptr, group_ptr, code_ptr, index, inside, KIND: tl.constexpr):
    if KIND == 1:
        return tl.load(scale_ptr + index, mask=inside, other=0.0)
    else:
        absmax = tl.load(scale_ptr + index, mask=inside, other=0).to(tl.int32)
        group = index // NESTED_BLOCKS
        scales = tl.load(code_ptr + absmax) * tl.load(group_ptr + group * 2, mask=inside, other=0.0)
        scales += tl.load(group_ptr + group * 2 + 1, mask=inside, other=0.0)
        return tl.where(inside, scales, 0.0)


@triton.jit
def fetch_words(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, k0: tl.constexpr, WIDTH: tl.constexpr,
                K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """As `fetch`, for `dot`: words of four codes [r, WIDTH / 4], or of eight [r, blocks, BLOCK / 8]."""
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    if KIND == 0:
        k = k0 // 4 + tl.arange(0, WIDTH // 4)
        inside = valid[:, None] & (k < K // 4)[None, :]
        words = tl.load(words_ptr + rows.to(tl.int64)[:, None] * (K // 4) + k[None, :], mask=inside, other=0)
        return words, tl.load(scale_ptr + rows, mask=valid, other=0.0) * INT8_STEP
    else:
        block = k0 // BLOCK + tl.arange(0, WIDTH // BLOCK)
        inside = valid[:, None] & (block < K // BLOCK)[None, :]
        index = rows.to(tl.int64)[:, None] * (K // BLOCK) + block[None, :]
        at = index[:, :, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, None, :]
        words = tl.load(words_ptr + at, mask=inside[:, :, None], other=0)
        return words, _block_scales(scale_ptr, group_ptr, code_ptr, index, inside, KIND)


@triton.jit
def decode(codes, table_ptr, KIND: tl.constexpr, LOOKUP: tl.constexpr):
    """Values of the codes, float32: two of the codes' shape, the second of use for 4 bits only."""
    if (KIND == 0) or (KIND == 3):
        values = codes.to(tl.float32)
        return values, values
    elif LOOKUP == "":
        code = codes.to(tl.int32)
        return tl.load(table_ptr + (code >> 4)), tl.load(table_ptr + (code & 15))
    else:
        high, low = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
        return high.to(tl.float32), low.to(tl.float32)


@triton.jit
def columns(k0: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Which activations the two values of a decoded tile are multiplied by."""
    if (KIND == 0) or (KIND == 3):
        k = k0 + tl.arange(0, WIDTH)
        return k, k
    else:
        blocks: tl.constexpr = WIDTH // BLOCK
        k = k0 + tl.arange(0, blocks)[:, None] * BLOCK + 2 * tl.arange(0, BLOCK // 2)[None, :]
        return k, k + 1


@triton.jit
def product(high, low, scales, even, odd, KIND: tl.constexpr):
    """The decoded tile times activations at `columns`: [r] float32."""
    if (KIND == 0) or (KIND == 3):
        return tl.sum(high * even[None, :], 1) * scales
    else:
        return tl.sum(tl.sum(high * even[None, :, :] + low * odd[None, :, :], 2) * scales, 1)
