"""One decode step of the language model: five kernels a layer, each reading every weight that it needs once.

Keys and values lie in pages that a row's table names; a row that has nothing to say is at position -1 and writes to
page 0, which is nobody's. All activations between kernels are float32.

A step is bound by the bytes of the weights, by the launches and by what decoding costs. So norms, rotation, SwiGLU and
residual sums happen where their inputs are read; with programmatic dependent launch a kernel fetches its weights while
the one before it still computes (only behind `wait` may anything be read that it wrote); and codes are not
decoded but multiplied as integers, by inputs as two signed bytes: 15 bits and a sign, of the largest input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from cosyq.kernels.launch import Kernel, cdiv, next_power_of_2
from cosyq.kernels.packed import FOUR_BIT, NESTED, Packed, parts_of

PAGE = 128  # positions

_qkv = Kernel("decode", "qkv")
_attend = Kernel("decode", "attend")
_output = Kernel("decode", "output")
_swiglu = Kernel("decode", "swiglu")
_down = Kernel("decode", "down")
_head = Kernel("decode", "head")


class Matrix(NamedTuple):
    """What a kernel has to know of a `Packed`, whose rows it takes in tiles, and whose columns in two parts."""

    n: int
    k: int
    kind: int
    block: int
    lookup: str
    dot: str
    first: int
    rest: int
    tile: int


def matrix(w: Packed, tile: int) -> Matrix:
    """Of `w`, in tiles of so many rows."""
    first, rest = parts_of(w.k, w.block)
    if first == rest and w.kind in (FOUR_BIT, NESTED):  # wide enough for loads of 16 bytes
        first, rest = 2 * first, 0
    dot = "" if w.k % 4 else w.dot  # rows are read in words
    return Matrix(w.n, w.k, w.kind, w.block, w.lookup, dot, first, rest, tile)


class Heads(NamedTuple):
    query: int
    kv: int
    dim: int
    pages_a_row: int
    page: int


@dataclass(frozen=True)
class Tiles:
    """How many rows of weights a program takes, and with how many warps."""

    qkv: tuple[int, int]  # pairs of rows
    output: tuple[int, int]
    swiglu: tuple[int, int]  # pairs of rows
    down: tuple[int, int]
    head: tuple[int, int]


# The best of three that were tried on an H100 (docs/speed.md).
TILES = Tiles(qkv=(8, 4), output=(8, 4), swiglu=(8, 4), down=(8, 8), head=(16, 4))


@dataclass(frozen=True)
class Geometry:
    """What the kernels of a step have to agree on. Of the row's `pages_a_row` only `pages` are in use."""

    heads: int
    kv_heads: int
    dim: int
    pages_a_row: int
    pages: int
    eps: float
    pdl: bool

    @property
    def sizes(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.dim, self.pages_a_row, PAGE)

    def launch(self, warps: int) -> dict[str, Any]:
        return {"PDL": self.pdl, "num_warps": warps} | ({"launch_pdl": True} if self.pdl else {})


@dataclass(frozen=True)
class Buffers:
    """Between the kernels, float32: x [1, hidden]; q [heads * dim]; parts [heads, pages_a_row, dim] with stats
    [heads, pages_a_row, 2]; inner [intermediate]. positions int32 [1], pages int32 [1, pages_a_row]; cos and sin
    [positions, dim / 2]. Of x, positions and pages there may be further rows, which are left alone."""

    x: Tensor
    q: Tensor
    parts: Tensor
    stats: Tensor
    inner: Tensor
    positions: Tensor
    pages: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Layer:
    """One layer's weights: its norms' gains, float32 [hidden], and its products."""

    attention_norm: Tensor
    qkv: Packed
    output: Packed
    mlp_norm: Tensor
    gate_up: Packed
    down: Packed


def run_layer(layer: Layer, keys: Tensor, values: Tensor, b: Buffers, g: Geometry) -> None:
    """x of one row after one layer, in place; keys and values [pages, kv_heads, PAGE, dim] gain the row's position."""
    t, width = TILES, next_power_of_2(b.x.shape[1])
    half = g.dim // 2
    pairs = min(t.qkv[0], half)
    _qkv[((g.heads + 2 * g.kv_heads) * (half // pairs),)](
        b.x, layer.attention_norm, layer.qkv.pointers, layer.qkv.bias, b.cos, b.sin, b.positions, b.pages,
        b.q, keys, values, g.eps, W=matrix(layer.qkv, pairs), H=g.sizes, PADDED=width, **g.launch(t.qkv[1]),
    )  # fmt: skip
    _attend[(g.heads, g.pages)](
        b.q, keys, values, b.positions, b.pages, b.parts, b.stats, g.dim**-0.5, H=g.sizes, **g.launch(4)
    )
    _output[(cdiv(layer.output.n, t.output[0]),)](
        b.parts, b.stats, b.positions, layer.output.pointers, b.x, W=matrix(layer.output, t.output[0]), H=g.sizes,
        **g.launch(t.output[1]),
    )  # fmt: skip
    _swiglu[(cdiv(layer.gate_up.n // 2, t.swiglu[0]),)](
        b.x, layer.mlp_norm, layer.gate_up.pointers, b.inner, g.eps, W=matrix(layer.gate_up, t.swiglu[0]),
        PADDED=width, **g.launch(t.swiglu[1]),
    )  # fmt: skip
    _down[(cdiv(layer.down.n, t.down[0]),)](
        b.inner, layer.down.pointers, b.x, W=matrix(layer.down, t.down[0]), **g.launch(t.down[1])
    )


def run_head(norm: Tensor, head: Packed, logits: Tensor, b: Buffers, g: Geometry) -> None:
    """logits [1, n] float32 of the normed x."""
    rows, warps = TILES.head
    _head[(cdiv(head.n, rows),)](
        b.x, norm, head.pointers, logits, g.eps, W=matrix(head, rows), PADDED=next_power_of_2(b.x.shape[1]),
        **g.launch(warps),
    )  # fmt: skip
