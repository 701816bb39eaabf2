"""The language model over several rows: utterances of a batch, or positions of prompts. Five kernels a layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cosyq.kernels.decode import PAGE, Layer
from cosyq.kernels.launch import Kernel, cdiv, next_power_of_2
from cosyq.kernels.packed import Packed

TOGETHER = 16  # positions of one prompt that attend together: prompts begin at multiples of it

_attend_rows = Kernel("row_attention", "attend_rows")
_attend_prompts = Kernel("row_attention", "attend_prompts")
_gather = Kernel("row_products", "gather")
_begin = Kernel("row_products", "begin")
_turned = Kernel("row_products", "turned")
_gated = Kernel("row_products", "gated")
_added = Kernel("row_products", "added")
_head = Kernel("row_products", "head")


@dataclass(frozen=True)
class Tile:
    """A product's tile: rows of activations, rows of weights, columns a step, warps, stages.

    splits: programs that share the columns. ways (of qkv and output): warps that share them within a program, which
    takes all columns in one step then, and fetches the weights before it waits.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1
    ways: int = 1

    def columns(self, k: int) -> tuple[int, int, int]:
        """Of k columns: how many a step takes, how many a program, and in how many ways."""
        step = min(self.k, max(next_power_of_2(k), 16))
        if self.ways > 1 and step >= k:
            return step, step, min(self.ways, step // 16)
        step = min(step, 128)
        return step, -(-cdiv(k, self.splits) // step) * step, 1

    def parts(self, rows: int, n: int, k: int) -> tuple[int, int]:
        """How many tiles there are, and how many sums of programs that share their columns."""
        count = cdiv(rows, self.m) * cdiv(n, self.n)
        splits = cdiv(k, self.columns(k)[1])
        return count, count * splits * self.m * self.n if splits > 1 else 0


@dataclass(frozen=True)
class Tiles:
    qkv: Tile
    output: Tile
    gate_up: Tile
    down: Tile
    head: Tile


def tiles(rows: int, *, together: bool, int8: bool) -> Tiles:
    """Measured on an H100 (docs/speed.md)."""
    if not together:
        if rows <= 16 or int8:
            narrow, down = Tile(16, 16, 1024, 4, 1, ways=4), Tile(16, 64, 128, 4, 4, splits=8)
        else:
            narrow, down = Tile(32, 16, 128, 4, 4), Tile(32, 32, 128, 4, 4, splits=4)
        m = narrow.m
        return Tiles(qkv=narrow, output=narrow, gate_up=Tile(m, 64, 128, 4, 4), down=down, head=Tile(m, 32, 128, 4, 4))
    few = rows <= 128
    return Tiles(
        qkv=Tile(64, 64, 128, 4, 3) if few else Tile(128, 64, 128, 8, 3), output=Tile(64, 32, 128, 4, 3),
        gate_up=Tile(64, 128, 128, 4 if few else 8, 3),
        down=Tile(64, 32, 128, 4, 3, splits=4) if few else Tile(64, 64, 128, 4, 3, splits=2),
        head=Tile(16, 32, 128, 4, 4),
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What the kernels of a pass over up to m rows share.

    x: float32 [m, hidden], what goes through the layers.
    gained: [m, hidden] in the products' type, x times the next norm's gain.
    squares: float32, sums of x's squares, see `Pass.squares`.
    q, attended: [m, heads * dim], inner: [m, intermediate], in the products' type.
    parts, counts: float32 and int32 (zeros), for products whose columns are split.
    page_parts, page_stats: float32, for rows whose pages are split.
    positions: int32 [m], -1 of nobody; owners: int32 [m], a row's place in pages, int32 [owners, pages a row].
    cos, sin: float32 [positions, dim / 2].
    """

    x: Tensor
    gained: Tensor
    squares: Tensor
    q: Tensor
    attended: Tensor
    inner: Tensor
    parts: Tensor
    counts: Tensor
    page_parts: Tensor
    page_stats: Tensor
    positions: Tensor
    owners: Tensor
    pages: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Shape:
    """Of the network."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    eps: float


def rows_of(
    s: Shape, positions: Tensor, owners: Tensor, pages: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype,
    *, together: bool,
) -> Rows:  # fmt: skip
    """Zeros for passes over as many rows as there are positions."""
    m, heads, device = len(positions), s.heads * s.dim, positions.device
    squares, counts, parts = 0, m * s.kv_heads, 1
    for rows, int8 in product(range(1, m + 1), (True, False)):
        t = tiles(rows, together=together, int8=int8)
        for tile, k in ((t.output, heads), (t.down, s.inner)):
            squares = max(squares, rows * cdiv(s.hidden, tile.n))
            needed = tile.parts(rows, s.hidden, k)
            counts, parts = max(counts, needed[0]), max(parts, needed[1])

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    shared = 0 if together else m * s.kv_heads * pages.shape[1] * places(s.heads, s.kv_heads)
    return Rows(
        empty(m, s.hidden), empty(m, s.hidden, kind=dtype), empty(squares), empty(m, heads, kind=dtype),
        empty(m, heads, kind=dtype), empty(m, s.inner, kind=dtype), empty(parts), empty(counts, kind=torch.int32),
        empty(max(shared * s.dim, 1)), empty(max(shared * 2, 1)), positions, owners, pages, cos, sin,
    )  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """A pass over `rows` of them.

    together: they come in `TOGETHER` positions of one prompt each; otherwise each is an utterance of its own, none
    beyond the first `pages` of its row.
    int8: that is how all weights are stored. Reading them twice costs less then than larger tiles do.
    """

    rows: int
    pages: int
    together: bool
    shape: Shape
    pdl: bool
    int8: bool = False

    @property
    def tiles(self) -> Tiles:
        return tiles(self.rows, together=self.together, int8=self.int8)

    def launch(self, warps: int, stages: int) -> dict[str, Any]:
        return {"PDL": self.pdl, "num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if self.pdl else {})

    def product(self, packed: Packed, tile: Tile) -> dict[str, Any]:
        step, span, _ = tile.columns(packed.k)
        return {
            "K": packed.k, "SPAN": span, "KIND": packed.kind, "BLOCK": packed.block, "LOOKUP": packed.lookup,
            "BM": tile.m, "BN": tile.n, "BK": step,
            "EARLY": tile.m == 16 and not self.together,
        } | self.launch(tile.warps, tile.stages)  # fmt: skip

    def squares(self, producer: Tile) -> dict[str, int]:
        """Sums of a row that a product leaves which adds to x."""
        count = cdiv(self.shape.hidden, producer.n)
        return {"TILES": count, "TILES_PADDED": next_power_of_2(count)}


def gather(source: Tensor, which: Tensor, out: Tensor) -> None:
    """out [rows, n] = the rows of source [any, n] that `which` names, int32 [rows] or more."""
    rows, width = out.shape
    _gather[(rows,)](source, which, out, N=width, PADDED=next_power_of_2(width), num_warps=4)


def begin(gain: Tensor, b: Rows, p: Pass) -> None:
    """What the first norm needs of x."""
    width = b.x.shape[1]
    _begin[(p.rows,)](
        b.x, gain, b.gained, b.squares, K=width, PADDED=next_power_of_2(width),
        **p.squares(p.tiles.down), **p.launch(4, 1),
    )  # fmt: skip


def run_layer(layer: Layer, next_gain: Tensor, keys: Tensor, values: Tensor, b: Rows, p: Pass) -> None:
    """x after one layer, in place; keys and values [pages, kv_heads, PAGE, dim] gain the rows' positions.

    next_gain: of the norm that follows the layer.
    """
    t, m, s = p.tiles, p.rows, p.shape
    turned = p.product(layer.qkv, t.qkv) | {"WAYS": t.qkv.columns(layer.qkv.k)[2]}
    turned["BN"] = min(t.qkv.n, s.dim)
    _turned[((s.heads + 2 * s.kv_heads) * (s.dim // turned["BN"]), cdiv(m, t.qkv.m))](
        b.gained, b.squares, *layer.qkv.pointers, layer.qkv.bias, b.cos, b.sin, b.positions, b.owners, b.pages, b.q,
        keys, values, m, s.eps, page_stride=b.pages.stride(0), HEADS=s.heads, KV_HEADS=s.kv_heads, DIM=s.dim,
        PAGE=PAGE, **p.squares(t.down), **turned,
    )  # fmt: skip
    attend(keys, values, b, p)
    _add(b.attended, layer.output, layer.mlp_norm, t.output, b, p)
    inner = layer.gate_up.n // 2
    _gated[(cdiv(inner, t.gate_up.n // 2), cdiv(m, t.gate_up.m))](
        b.gained, b.squares, *layer.gate_up.pointers, b.inner, m, s.eps, N=inner, **p.squares(t.output),
        **p.product(layer.gate_up, t.gate_up),
    )  # fmt: skip
    _add(b.inner, layer.down, next_gain, t.down, b, p)


def attend(keys: Tensor, values: Tensor, b: Rows, p: Pass) -> None:
    """`attended` of q, each row over the positions of its own pages up to its own."""
    s, given = p.shape, (b.q, keys, values, b.positions, b.owners, b.pages, b.attended)
    sizes = {"page_stride": b.pages.stride(0), "HEADS": s.heads, "KV_HEADS": s.kv_heads, "DIM": s.dim, "PAGE": PAGE}
    if p.together:
        _attend_prompts[(cdiv(p.rows, TOGETHER), s.heads)](
            *given, p.rows, s.dim**-0.5, TOGETHER=TOGETHER, **sizes, **p.launch(4, 1)
        )
    else:
        _attend_rows[(p.rows, s.kv_heads, p.pages)](
            *given, b.page_parts, b.page_stats, b.counts, s.dim**-0.5,
            PLACES=places(s.heads, s.kv_heads), **sizes, **p.launch(4, 1),
        )  # fmt: skip


def places(heads: int, kv_heads: int) -> int:
    """Rows of a tile that the heads which share keys take."""
    return max(next_power_of_2(heads // kv_heads), 16)


def _add(y: Tensor, packed: Packed, gain: Tensor, tile: Tile, b: Rows, p: Pass) -> None:
    count = cdiv(packed.n, tile.n)
    sizes = p.product(packed, tile) | {"WAYS": tile.columns(packed.k)[2]}
    splits = cdiv(packed.k, sizes["SPAN"])
    _added[(count, cdiv(p.rows, tile.m), splits)](
        y, *packed.pointers, b.x, gain, b.gained, b.squares, b.parts, b.counts, p.rows, N=packed.n, TILES=count,
        SPLITS=splits, **sizes,
    )  # fmt: skip


def run_head(head: Packed, which: Tensor, logits: Tensor, b: Rows, p: Pass) -> None:
    """logits [m, n] float32 of the normed x of the rows that `which` names, int32 [m] or more, written by no kernel."""
    m, t = logits.shape[0], p.tiles.head
    _head[(cdiv(head.n, t.n), cdiv(m, t.m))](
        b.gained, b.squares, which, *head.pointers, logits, m, p.shape.eps, N=head.n, **p.squares(p.tiles.down),
        **p.product(head, t),
    )  # fmt: skip
