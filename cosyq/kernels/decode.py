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

from cosyq.kernels.launch import Kernel, cdiv
from cosyq.kernels.packed import FLOAT, FOUR_BIT, INT8, NESTED, Packed, parts_of

PAGE = 128  # positions

_qkv = Kernel("decode", "qkv")
_attend = Kernel("decode", "attend")
_output = Kernel("decode", "output")
_swiglu = Kernel("decode", "swiglu")
_down = Kernel("decode", "down")
_head = Kernel("decode", "head")


class Tile(NamedTuple):
    """How many rows of weights, or pairs of rows, a program takes, with how many warps.

    registers: of a thread, at most; 0 for as many as the compiler likes.
    early: see `Matrix`.
    """

    rows: int
    warps: int
    registers: int = 0
    early: bool = False


@dataclass(frozen=True)
class Tiles:
    qkv: Tile  # pairs
    attend: Tile  # of a page's positions, all
    output: Tile
    swiglu: Tile  # pairs
    down: Tile
    head: Tile


# The best of what was tried on an H100 (docs/speed.md). Where programs of one kernel leave registers free, those of the
# next are there before it is over, with their weights.
INT8_TILES = Tiles(Tile(16, 8), Tile(PAGE, 4), Tile(16, 8), Tile(16, 8), Tile(4, 4), Tile(16, 4))
FOUR_BIT_TILES = Tiles(Tile(8, 8, early=True), Tile(PAGE, 4), Tile(16, 8), Tile(8, 4), Tile(8, 8, 96), Tile(16, 4))
FLOAT_TILES = Tiles(Tile(4, 4), Tile(PAGE, 4), Tile(16, 8), Tile(4, 4), Tile(4, 4), Tile(16, 4))
TILES = {INT8: INT8_TILES, FOUR_BIT: FOUR_BIT_TILES, NESTED: FOUR_BIT_TILES, FLOAT: FLOAT_TILES}


class Matrix(NamedTuple):
    """What a kernel has to know of a `Packed`, whose rows it takes in tiles, and whose columns in two parts.

    wide, more: the parts of the inputs.
    early: 4-bit codes are looked up before the inputs are there.
    """

    n: int
    k: int
    kind: int
    block: int
    lookup: str
    dot: bool
    first: int
    rest: int
    wide: int
    more: int
    tile: int
    early: bool


def matrix(w: Packed, tile: Tile) -> Matrix:
    """Of `w`, in such tiles."""
    first, rest = parts_of(w.k, w.block)
    if first == rest and w.kind in (FOUR_BIT, NESTED):  # wide enough for loads of 16 bytes
        first, rest = 2 * first, 0
    dot = w.dot and w.k % 4 == 0  # rows are read in words
    wide, more = (first + rest, 0) if dot and first == rest else (first, rest)
    return Matrix(w.n, w.k, w.kind, w.block, w.lookup, dot, first, rest, wide, more, tile.rows, tile.early)


def pointers(w: Packed) -> tuple[Tensor, ...]:
    return *w.pointers, w.table if w.planes is None else w.planes


class Heads(NamedTuple):
    query: int
    kv: int
    dim: int
    pages_a_row: int
    page: int


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

    def launch(self, tile: Tile) -> dict[str, Any]:
        overlaps = {"launch_pdl": True} if self.pdl else {}
        registers = {"maxnreg": tile.registers} if tile.registers else {}
        return {"PDL": self.pdl, "num_warps": tile.warps} | overlaps | registers


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
    half = g.dim // 2
    tile = TILES[layer.qkv.kind].qkv
    tile = tile._replace(rows=min(tile.rows, half))
    _qkv[((g.heads + 2 * g.kv_heads) * (half // tile.rows),)](
        b.x, layer.attention_norm, pointers(layer.qkv), layer.qkv.bias, b.cos, b.sin, b.positions, b.pages,
        b.q, keys, values, g.eps, W=matrix(layer.qkv, tile), H=g.sizes, **g.launch(tile),
    )  # fmt: skip
    tile = TILES[layer.qkv.kind].attend
    _attend[(g.heads, g.pages)](
        b.q, keys, values, b.positions, b.pages, b.parts, b.stats, g.dim**-0.5, H=g.sizes, **g.launch(tile)
    )
    tile = TILES[layer.output.kind].output
    _output[(cdiv(layer.output.n, tile.rows),)](
        b.parts, b.stats, b.positions, pointers(layer.output), b.x, W=matrix(layer.output, tile), H=g.sizes,
        **g.launch(tile),
    )  # fmt: skip
    tile = TILES[layer.gate_up.kind].swiglu
    _swiglu[(cdiv(layer.gate_up.n // 2, tile.rows),)](
        b.x, layer.mlp_norm, pointers(layer.gate_up), b.inner, g.eps, W=matrix(layer.gate_up, tile), **g.launch(tile)
    )
    tile = TILES[layer.down.kind].down
    _down[(cdiv(layer.down.n, tile.rows),)](
        b.inner, pointers(layer.down), b.x, W=matrix(layer.down, tile), **g.launch(tile)
    )


def run_head(norm: Tensor, head: Packed, logits: Tensor, b: Buffers, g: Geometry) -> None:
    """logits [1, n] float32 of the normed x."""
    tile = TILES[head.kind].head
    _head[(cdiv(head.n, tile.rows),)](b.x, norm, pointers(head), logits, g.eps, W=matrix(head, tile), **g.launch(tile))
