"""The language model over several rows at once: utterances of a batch, or positions of a prompt.

A product reads every packed weight once for all rows, on tensor cores; around it, one kernel each for what torch would
do in a dozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.packed import Packed, decode, fetch

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _matmul(x_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, bias_ptr, out_ptr, M,
            N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr,
            DOT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside, valid = m < M, n < N
    total = tl.zeros((BM, BN), tl.float32)
    row_scale = tl.full((BN,), 1.0, tl.float32)
    for k0 in range(0, K, BK):
        codes, scales = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, k0, BK, K, KIND, BLOCK)
        high, low = decode(codes, table_ptr, KIND, LOOKUP)
        if (KIND == 0) or (KIND == 3):
            k = k0 + tl.arange(0, BK)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
            total = tl.dot(x.to(DOT), tl.trans(high.to(DOT)), total, input_precision="ieee")
            row_scale = scales
        else:
            k = k0 + 2 * tl.arange(0, BK // 2)
            read = inside[:, None] & (k < K)[None, :]
            even = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=read, other=0.0)
            odd = tl.load(x_ptr + m[:, None] * K + k[None, :] + 1, mask=read, other=0.0)
            high = tl.reshape(high * scales[:, :, None], (BN, BK // 2))
            low = tl.reshape(low * scales[:, :, None], (BN, BK // 2))
            total = tl.dot(even.to(DOT), tl.trans(high.to(DOT)), total, input_precision="ieee")
            total = tl.dot(odd.to(DOT), tl.trans(low.to(DOT)), total, input_precision="ieee")
    total = total * row_scale[None, :]
    if BIAS:
        total += tl.load(bias_ptr + n, mask=valid, other=0.0)[None, :]
    to = out_ptr + m[:, None] * N + n[None, :]
    both = inside[:, None] & valid[None, :]
    if ADD:
        total += tl.load(to, mask=both, other=0.0)
    tl.store(to, total, mask=both)


@triton.jit
def _norm(x_ptr, gain_ptr, out_ptr, eps, K: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, PADDED)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    x *= tl.load(gain_ptr + k, mask=k < K, other=0.0)
    tl.store(out_ptr + row * K + k, x.to(out_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _turn(qkv_ptr, q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, position_ptr, page_ptr, page_stride,
          HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Rotate the queries and keys of a row by its position; keys and values go to its page."""
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    i = tl.arange(0, half)
    at = qkv_ptr + (row * (HEADS + 2 * KV_HEADS) + head) * DIM
    one, two = tl.load(at + i), tl.load(at + half + i)
    place = tl.load(position_ptr + row)
    position = tl.maximum(place, 0)
    if head < HEADS + KV_HEADS:
        cos, sin = tl.load(cos_ptr + position * half + i), tl.load(sin_ptr + position * half + i)
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < HEADS:
        q = q_ptr + (row * HEADS + head) * DIM
        tl.store(q + i, one)
        tl.store(q + half + i, two)
    else:
        page = tl.load(page_ptr + row * page_stride + position // PAGE, mask=place >= 0, other=0).to(tl.int64)
        cache = key_ptr if head < HEADS + KV_HEADS else value_ptr
        to = cache + ((page * KV_HEADS + (head - HEADS) % KV_HEADS) * PAGE + position % PAGE) * DIM
        tl.store(to + i, one.to(key_ptr.dtype.element_ty))
        tl.store(to + half + i, two.to(key_ptr.dtype.element_ty))


@triton.jit
def _swiglu(x_ptr, out_ptr, N: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(x_ptr + row * 2 * N + n, mask=n < N, other=0.0)
    up = tl.load(x_ptr + row * 2 * N + N + n, mask=n < N, other=0.0)
    tl.store(out_ptr + row * N + n, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _merge(part_ptr, stat_ptr, position_ptr, out_ptr, pages_a_row: tl.constexpr, HEADS: tl.constexpr,
           DIM: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """The parts of a row's pages (see `decode._attend`) as one softmax."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DIM)
    first = (row * HEADS + head) * pages_a_row
    largest, total = tl.load(stat_ptr + first * 2), tl.load(stat_ptr + first * 2 + 1)
    out = tl.load(part_ptr + first * DIM + d)
    count = tl.maximum(tl.load(position_ptr + row), 0) // PAGE + 1
    number = 1
    while number < count:
        part = first + number
        other = tl.load(stat_ptr + part * 2)
        both = tl.maximum(largest, other)
        mine, its = tl.exp(largest - both), tl.exp(other - both)
        out = out * mine + tl.load(part_ptr + part * DIM + d) * its
        total = total * mine + tl.load(stat_ptr + part * 2 + 1) * its
        largest = both
        number += 1
    tl.store(out_ptr + (row * HEADS + head) * DIM + d, (out / total).to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Tile:
    """A product's tile: rows of activations, rows of weights, columns a step, warps, stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile(rows: int, packed: Packed) -> Tile:
    """Measured (docs/speed.md)."""
    if rows <= 16:
        return Tile(16, 32 if packed.n > 4096 else 16, 256, 4, 4)
    return Tile(64, 64, 128, 4, 3)


def matmul(x: Tensor, packed: Packed, out: Tensor, *, add: bool = False) -> None:
    """out [m, n] float32 = (or +=) x [m, k] times the packed rows, plus their bias; products in x's dtype."""
    m = x.shape[0]
    t = tile(m, packed)
    bk = min(t.k, max(triton.next_power_of_2(packed.k), packed.block, 16))
    _matmul[(triton.cdiv(packed.n, t.n), triton.cdiv(m, t.m))](
        x, *packed.pointers, packed.scales if packed.bias is None else packed.bias, out, m,
        N=packed.n, K=packed.k, KIND=packed.kind, BLOCK=packed.block, LOOKUP=packed.lookup,
        DOT=DOT_DTYPES[x.dtype], BIAS=packed.bias is not None, ADD=add, BM=t.m, BN=t.n, BK=bk,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip


def norm(x: Tensor, gain: Tensor, out: Tensor, eps: float) -> None:
    """RMS norm of x [m, k] float32, into out [m, k] of any float dtype."""
    rows, width = x.shape
    _norm[(rows,)](x, gain, out, eps, K=width, PADDED=triton.next_power_of_2(width))


def turn(
    qkv: Tensor, q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, pages: Tensor,
    *, heads: int,
) -> None:  # fmt: skip
    """Split qkv [m, (heads + 2 kv_heads) * dim]: q [m, heads * dim] float32 turned, keys and values to their pages.

    positions: int32 [m]. pages: int32, the rows' tables [m, pages], or one table [pages] for all of them.
    """
    kv_heads, page, dim = keys.shape[1:]
    stride = pages.stride(0) if pages.dim() == 2 else 0
    _turn[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, q, keys, values, cos, sin, positions, pages, stride, HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page,
        num_warps=1,
    )  # fmt: skip


def swiglu(x: Tensor, out: Tensor) -> None:
    """silu(x[:, :n]) * x[:, n:], into out [m, n] of any float dtype."""
    rows, n = out.shape
    _swiglu[(rows, triton.cdiv(n, 1024))](x, out, N=n, TILE=1024)


def merge(parts: Tensor, stats: Tensor, positions: Tensor, out: Tensor, *, rows: int, page: int) -> None:
    """What the heads attended to, [rows, heads * dim] in out's dtype, of the parts of all pages."""
    heads, pages_a_row, dim = parts.shape[1:]
    _merge[(rows, heads)](
        parts, stats, positions, out, pages_a_row=pages_a_row, HEADS=heads, DIM=dim, PAGE=page, num_warps=2
    )
