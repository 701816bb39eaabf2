"""One decode step of the language model, see `cosyq.kernels.decode`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.decode_products import fetched, inputs_of, normed, read, read_attended, times
from cosyq.kernels.device.overlap import let_next_start, wait


@triton.jit
def _rows(W: tl.constexpr):
    n = tl.program_id(0) * W.tile + tl.arange(0, W.tile)
    return n, n < W.n


@triton.jit
def qkv_kernel(x_ptr, gain_ptr, w, bias_ptr, cos_ptr, sin_ptr, position_ptr, page_ptr, q_ptr, key_ptr, value_ptr, eps,
               W: tl.constexpr, H: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Normed x projected; queries and keys turned by their position, keys and values written to their page."""
    half: tl.constexpr = H.dim // 2
    pid = tl.program_id(0)
    head = pid // (half // W.tile)
    start = pid % (half // W.tile) * W.tile
    row = tl.arange(0, 2 * W.tile)  # each beside the row `half` below it, with which it turns
    n = head * H.dim + start + row // 2 + row % 2 * half
    tile = fetched(w, n, start + row // 2 < half, W)
    bias, gains = tl.load(bias_ptr + n), read(gain_ptr, W)
    wait(PDL)
    let_next_start(PDL)
    place = tl.load(position_ptr)
    position = tl.maximum(place, 0)
    inputs, r = normed(read(x_ptr, W), gains, eps, W)
    one, two = tl.split(tl.reshape(times(tile, inputs, w[2], W) * r + bias, (W.tile, 2)))
    pair = start + tl.arange(0, W.tile)
    upper = head * H.dim + pair
    if head < H.query + H.kv:
        cos = tl.load(cos_ptr + position * half + pair)
        sin = tl.load(sin_ptr + position * half + pair)
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < H.query:
        tl.store(q_ptr + upper, one)
        tl.store(q_ptr + upper + half, two)
    else:
        page = tl.load(page_ptr + position // H.page, mask=place >= 0, other=0).to(tl.int64)
        cache = key_ptr if head < H.query + H.kv else value_ptr
        kv_head = (head - H.query) % H.kv
        to = cache + ((page * H.kv + kv_head) * H.page + position % H.page) * H.dim + pair
        tl.store(to, one.to(key_ptr.dtype.element_ty))
        tl.store(to + half, two.to(key_ptr.dtype.element_ty))


@triton.jit
def attend_kernel(q_ptr, key_ptr, value_ptr, position_ptr, page_ptr, out_ptr, stat_ptr, softmax_scale, H: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One page for one head: its part of the sum, its largest score and its sum of weights.

    The heads of a group read the same keys and values, all but one of them from the cache of the chip. All positions
    but the last were there before the kernel in front began, and are fetched while that one runs.
    """
    head, number = tl.program_id(0), tl.program_id(1)
    kv_head = head // (H.query // H.kv)
    position = tl.load(position_ptr, cache_modifier=".cg")
    page = tl.load(page_ptr + number, mask=number * H.page <= position, other=0).to(tl.int64)
    at, d = tl.arange(0, H.page), tl.arange(0, H.dim)
    first = (page * H.kv + kv_head) * H.page * H.dim
    tile = first + at[:, None] * H.dim + d[None, :]
    past = (number * H.page + at < position)[:, None]
    past_keys = tl.load(key_ptr + tile, mask=past, other=0.0, cache_modifier=".cg")
    past_values = tl.load(value_ptr + tile, mask=past, other=0.0, cache_modifier=".cg")
    wait(PDL)
    let_next_start(PDL)
    if number * H.page <= position:
        q = tl.load(q_ptr + head * H.dim + d)
        new = first + tl.minimum(position - number * H.page, H.page - 1) * H.dim + d
        here, seen = (number * H.page + at == position)[:, None], number * H.page + at <= position
        keys = tl.where(here, tl.load(key_ptr + new)[None, :], past_keys).to(tl.float32)
        values = tl.where(here, tl.load(value_ptr + new)[None, :], past_values).to(tl.float32)
        scores = tl.where(seen, tl.sum(keys * q[None, :], 1) * softmax_scale, float("-inf"))
        largest = tl.max(scores, 0)
        weights = tl.exp(scores - largest)
        part = head * H.pages_a_row + number
        tl.store(out_ptr + part * H.dim + d, tl.sum(weights[:, None] * values, 0))
        tl.store(stat_ptr + part * 2, largest)
        tl.store(stat_ptr + part * 2 + 1, tl.sum(weights, 0))


@triton.jit
def output_kernel(part_ptr, stat_ptr, position_ptr, w, x_ptr, W: tl.constexpr, H: tl.constexpr, PDL: tl.constexpr):
    """What the heads attended to, projected, added to x."""
    n, valid = _rows(W)
    tile = fetched(w, n, valid, W)
    count = tl.maximum(tl.load(position_ptr, cache_modifier=".cg"), 0) // H.page + 1
    x = tl.load(x_ptr + n, mask=valid, other=0.0, cache_modifier=".cg")  # as the kernel before attention left it
    wait(PDL)
    let_next_start(PDL)
    attended = read_attended(part_ptr, stat_ptr, count, W, H)
    out = times(tile, inputs_of(attended, W), w[2], W)
    tl.store(x_ptr + n, x + out, mask=valid)


@triton.jit
def swiglu_kernel(x_ptr, gain_ptr, w, out_ptr, eps, W: tl.constexpr, PDL: tl.constexpr):
    """silu(gate) * up of the normed x; the weight's first half of rows is the gate's."""
    half: tl.constexpr = W.n // 2
    start = tl.program_id(0) * W.tile
    row = tl.arange(0, 2 * W.tile)  # the gate's beside up's
    n = start + row // 2
    tile = fetched(w, n + row % 2 * half, n < half, W)
    gains = read(gain_ptr, W)
    wait(PDL)
    let_next_start(PDL)
    inputs, r = normed(read(x_ptr, W), gains, eps, W)
    gate, up = tl.split(tl.reshape(times(tile, inputs, w[2], W) * r, (W.tile, 2)))
    to = start + tl.arange(0, W.tile)
    tl.store(out_ptr + to, gate / (1 + tl.exp(-gate)) * up, mask=to < half)


@triton.jit
def down_kernel(inner_ptr, w, x_ptr, W: tl.constexpr, PDL: tl.constexpr):
    """What SwiGLU left, projected, added to x."""
    n, valid = _rows(W)
    tile = fetched(w, n, valid, W)
    x = tl.load(x_ptr + n, mask=valid, other=0.0, cache_modifier=".cg")
    wait(PDL)
    let_next_start(PDL)
    out = times(tile, inputs_of(read(inner_ptr, W), W), w[2], W)
    tl.store(x_ptr + n, x + out, mask=valid)


@triton.jit
def head_kernel(x_ptr, gain_ptr, w, out_ptr, eps, W: tl.constexpr, PDL: tl.constexpr):
    """The normed x times the weight."""
    n, valid = _rows(W)
    tile = fetched(w, n, valid, W)
    gains = read(gain_ptr, W)
    wait(PDL)
    let_next_start(PDL)
    inputs, r = normed(read(x_ptr, W), gains, eps, W)
    tl.store(out_ptr + n, times(tile, inputs, w[2], W) * r, mask=valid)
