"""Tiles of packed weights, fetched and decoded."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels import packed

INT8_STEP = tl.constexpr(7.874015718698502e-3)  # as `quantize.formats` has it
NESTED_BLOCKS = tl.constexpr(packed.NESTED_BLOCKS)


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
    return _unpacked(tl.load(scale_ptr + index, mask=inside, other=0), group_ptr, code_ptr, index, inside, KIND)


@triton.jit
def _unpacked(scales, group_ptr, code_ptr, index, inside, KIND: tl.constexpr):
    if KIND == 1:
        return scales
    else:
        shape: tl.constexpr = index.shape
        scales = tl.reshape(scales, (index.numel,))
        index, inside = tl.reshape(index, (index.numel,)), tl.reshape(inside, (index.numel,))
        group = index // NESTED_BLOCKS
        scale = tl.load(group_ptr + group * 2, mask=inside, other=0.0)
        offset = tl.load(group_ptr + group * 2 + 1, mask=inside, other=0.0)
        return tl.reshape(tl.where(inside, tl.load(code_ptr + scales.to(tl.int32)) * scale + offset, 0.0), shape)


@triton.jit
def _places(rows, valid, k0: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    block = k0 // BLOCK + tl.arange(0, WIDTH // BLOCK)
    inside = valid[:, None] & (block < K // BLOCK)[None, :]
    return rows.to(tl.int64)[:, None] * (K // BLOCK) + block[None, :], inside


@triton.jit
def fetch_words(w_ptr, rows, valid, k0: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr):
    """Codes as in `fetch`, for `dot`: words of four [r, WIDTH / 4], or of eight [r, WIDTH / 8]."""
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    codes: tl.constexpr = 4 if KIND == 0 else 8
    k = k0 // codes + tl.arange(0, WIDTH // codes)
    inside = valid[:, None] & (k < K // codes)[None, :]
    return tl.load(words_ptr + rows.to(tl.int64)[:, None] * (K // codes) + k[None, :], mask=inside, other=0)


@triton.jit
def fetch_scales(scale_ptr, group_ptr, code_ptr, rows, valid, FIRST: tl.constexpr, REST: tl.constexpr,
                 K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Scales as in `fetch`, of the first columns and of the rest."""
    if KIND == 0:
        scales = tl.load(scale_ptr + rows, mask=valid, other=0.0) * INT8_STEP
        return scales, scales
    else:
        index, inside = _places(rows, valid, 0, FIRST, K, BLOCK)
        first = tl.load(scale_ptr + index, mask=inside, other=0)
        if REST == 0:
            scales = _unpacked(first, group_ptr, code_ptr, index, inside, KIND)
            return scales, scales
        else:
            more_index, more_inside = _places(rows, valid, FIRST, REST, K, BLOCK)
            rest = tl.load(scale_ptr + more_index, mask=more_inside, other=0)  # before `first` is waited for
            return (_unpacked(first, group_ptr, code_ptr, index, inside, KIND),
                    _unpacked(rest, group_ptr, code_ptr, more_index, more_inside, KIND))  # fmt: skip


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
