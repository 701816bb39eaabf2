"""Packing that makes up for its own error on a layer's inputs, in the tensors and the bytes that `pack` gives.

Rounding to the nearest code minimizes |W - Q|. What a layer gives out is wrong by (W - Q) x, whose mean square is
tr((W - Q) H (W - Q)^T), H the second moment of its inputs x. Three known steps bring that down:

1. A block's absmax is the one, up to its largest weight, with which it is rounded best.
2. GPTQ (arXiv 2210.17323): columns are rounded one after another, and those to come make up for what each lost.
3. Coordinate descent (QuantEase, arXiv 2309.01885): each absmax is fitted anew to its codes, each code chosen anew
   beside all others. No sweep makes the error larger.

Rows do not know of each other: a column of all of them is rounded at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosyq.quantize.formats import NESTED_BLOCKSIZE, Format, dequantize, encode_state, state_key
from cosyq.quantize.pack import nest, pack, relative_error

SHRINK = tuple(1 - 0.02 * step for step in range(20))  # a block's absmax, of its largest weight
DAMPING = 0.1  # of the inputs' mean square, added to each one's: what was seen is not all that will be
SWEEPS = 3
TOGETHER = 128  # columns whose effect on the rest is applied at once


@dataclass(frozen=True)
class Calibrated:
    """What a weight became.

    tensors: as `pack` gives them, on the host.
    error: relative, |Q - W| / |W|. Usually more than plain rounding makes.
    weighted, plain: relative, the root of tr((W - Q) H (W - Q)^T) / tr(W H W^T), of this and of plain packing.
    """

    tensors: dict[str, Tensor]
    error: float
    weighted: float
    plain: float


def pack_calibrated(weight: Tensor, moment: Tensor, fmt: Format, device: torch.device) -> Calibrated:
    """Pack `weight` [out, in] (any float dtype) on `device` for inputs with the second moment `moment` [in, in].

    Where that is no better on such inputs than plain packing, the result is plain packing's.

    Raises:
        OverflowError: the format cannot hold a value of the weight, or the weight is not finite.
        ValueError: the moment is none, or a row of the weight is not whole blocks.
    """
    plain, plain_error = pack(weight, fmt, device)
    source, seen = weight.to(device).float(), _checked(moment, weight.shape[1]).to(device)
    damped = seen + torch.eye(len(seen), device=device) * (seen.diagonal().mean() * DAMPING)
    grid = _grid(source, damped.diagonal(), fmt, {name: tensor.to(device) for name, tensor in plain.items()})
    cells, absmax = _swept(source, damped, grid, *_gptq(source, damped, grid))
    packed = {name: tensor.cpu() for name, tensor in grid.stored(cells, absmax).items()}

    def weighted(tensors: dict[str, Tensor]) -> float:
        lost = source - dequantize(fmt, tensors, tuple(weight.shape)).to(device)
        return (_energy(lost, seen) / max(_energy(source, seen), 1e-300)) ** 0.5

    before, after = weighted(plain), weighted(packed)
    if not after < before:
        return Calibrated(plain, plain_error, before, before)
    error = relative_error(dequantize(fmt, packed, tuple(weight.shape)).to(device) - source, source)
    return Calibrated(packed, error, after, before)


@dataclass(frozen=True)
class _Grid:
    """What can be stored of one weight.

    plain: the tensors of plain packing, of which only codes and absmax change.
    levels, codes: what a code stands for beside an absmax of 1, ascending [levels]; and the code as stored.
    block: columns that share an absmax.
    nested: under double quantization what the absmax are made of: scale of each [out, blocks], ascending values [256],
        their codes, offset.
    """

    format: Format
    plain: dict[str, Tensor]
    levels: Tensor
    codes: Tensor
    block: int
    nested: tuple[Tensor, Tensor, Tensor, float] | None

    def nearest(self, wanted: Tensor, absmax: Tensor) -> Tensor:
        """The number of the level nearest to wanted / absmax, broadcast."""
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(wanted / torch.where(absmax == 0, 1, absmax), between)

    def possible(self, absmax: Tensor, block: int) -> Tensor:
        """The nearest absmax [out] that blocks of this number can have."""
        return absmax if self.nested is None else self._nested(absmax, block)[1]

    def _nested(self, absmax: Tensor, blocks: int | slice) -> tuple[Tensor, Tensor]:
        """The nearest codes, and what they stand for."""
        assert self.nested is not None
        scales, values, codes, offset = self.nested
        scale = scales[:, blocks]
        wanted = (absmax - offset) / torch.where(scale == 0, 1, scale)
        index = torch.bucketize(wanted, (values[1:] + values[:-1]) / 2)
        return codes[index], values[index] * scale + offset

    def stored(self, cells: Tensor, absmax: Tensor) -> dict[str, Tensor]:
        """Level numbers [out, in] and possible absmax [out, blocks] as tensors."""
        codes = self.codes[cells]
        if self.format.name == "int8":
            return self.plain | {"weight": codes, "SCB": absmax[:, 0]}
        pairs = codes.view(-1, 2)
        packed = self.plain | {"weight": pairs[:, :1] << 4 | pairs[:, 1:]}
        if self.nested is None:
            return packed | {"weight.absmax": absmax.reshape(-1)}
        return packed | {"weight.absmax": self._nested(absmax, slice(None))[0].reshape(-1)}


def _grid(source: Tensor, weights: Tensor, fmt: Format, plain: dict[str, Tensor]) -> _Grid:
    out, width = source.shape
    if fmt.name == "int8":
        codes = torch.arange(-127, 128, device=source.device)
        return _Grid(fmt, plain, codes / 127, codes.to(torch.int8), width, None)
    assert fmt.blocksize is not None
    if width % fmt.blocksize:
        raise ValueError(f"rows of {width} are not whole blocks of {fmt.blocksize}")
    levels, order = plain["weight.quant_map"].sort(stable=True)
    grid = _Grid(fmt, plain, levels, order.to(torch.uint8), fmt.blocksize, None)
    if not fmt.double_quant:
        return grid
    blocks = [_best_absmax(part, w, grid) for part, w in _blocks(source, weights, fmt.blocksize)]
    nested, offset = nest(torch.stack(blocks, dim=1).reshape(-1))
    plain = plain | nested | {state_key(fmt): encode_state(fmt, (out, width), offset)}
    scales = nested["weight.nested_absmax"].repeat_interleave(NESTED_BLOCKSIZE)[: out * len(blocks)]
    values, order = nested["weight.nested_quant_map"].sort(stable=True)
    return _Grid(fmt, plain, levels, grid.codes, fmt.blocksize, (scales.view(out, -1), values, order.byte(), offset))


def _blocks(source: Tensor, weights: Tensor, block: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(source.split(block, dim=1), weights.split(block), strict=True)


def _best_absmax(part: Tensor, weights: Tensor, grid: _Grid) -> Tensor:
    """The absmax [out] of a block [out, block] with the least squared error, each column's weighted by `weights`."""
    largest = part.abs().amax(1)
    best, least = largest, torch.full_like(largest, float("inf"))
    for share in SHRINK:
        absmax = (largest * share)[:, None]
        rounded = grid.levels[grid.nearest(part, absmax)] * absmax
        error = ((part - rounded).square() * weights).sum(1)
        best, least = torch.where(error < least, absmax[:, 0], best), torch.minimum(error, least)
    return best


def _gptq(source: Tensor, seen: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Level numbers [out, in] and absmax [out, blocks]; a block's absmax is searched for when its turn comes."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(seen.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left, cells = source.clone(), torch.empty(source.shape, dtype=torch.int64, device=source.device)
    absmax = torch.empty(len(source), source.shape[1] // grid.block, device=source.device)
    cost = upper.diagonal().square().reciprocal()  # of an error in a column, after those to come made up for it
    for start, end in _runs(source.shape[1], grid.block):
        block = start // grid.block
        if start % grid.block == 0:
            span = slice(start, start + grid.block)
            absmax[:, block] = grid.possible(_best_absmax(left[:, span], cost[span], grid), block)
        scale, lost = absmax[:, block], torch.empty(len(source), end - start, device=source.device)
        for column in range(start, end):
            cells[:, column] = grid.nearest(left[:, column], scale)
            error = (left[:, column] - grid.levels[cells[:, column]] * scale) / upper[column, column]
            left[:, column:end] -= error[:, None] * upper[column, column:end]
            lost[:, column - start] = error
        left[:, end:] -= lost @ upper[start:end, end:]
    return cells, absmax


def _swept(source: Tensor, seen: Tensor, grid: _Grid, cells: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Both, after sweeps of coordinate descent."""
    rounded = grid.levels[cells] * absmax.repeat_interleave(grid.block, dim=1)
    lost = source - rounded
    for start, end in _runs(source.shape[1], grid.block) * SWEEPS:
        block = start // grid.block
        if start % grid.block == 0:
            span = slice(start, start + grid.block)
            levels = grid.levels[cells[:, span]]
            pull = (levels * (lost @ seen[:, span])).sum(1)
            stiffness = (levels @ seen[span, span] * levels).sum(1)
            fitted = absmax[:, block] + pull / torch.where(stiffness == 0, 1, stiffness)
            absmax[:, block] = grid.possible(fitted, block)
            rounded[:, span] = levels * absmax[:, block, None]
            lost[:, span] = source[:, span] - rounded[:, span]
        span, scale = slice(start, end), absmax[:, block]
        own, pull = seen[span, span], lost @ seen[:, span]
        for column in range(start, end):
            at = column - start
            cells[:, column] = grid.nearest(rounded[:, column] + pull[:, at] / own[at, at], scale)
            now = grid.levels[cells[:, column]] * scale
            pull -= (now - rounded[:, column])[:, None] * own[at]
            rounded[:, column] = now
        lost[:, span] = source[:, span] - rounded[:, span]
    return cells, absmax


def _runs(width: int, block: int) -> list[tuple[int, int]]:
    """Columns that are done together, first and last but one; none reaches over the end of a block."""
    starts = [start for block_start in range(0, width, block) for start in range(block_start, block_start + block, TOGETHER)]
    return [(start, min(start + TOGETHER, start - start % block + block)) for start in starts]


def _checked(moment: Tensor, width: int) -> Tensor:
    moment = moment.float()
    if moment.shape != (width, width):
        raise ValueError(f"the inputs' second moment is {list(moment.shape)}, expected [{width}, {width}]")
    if not torch.isfinite(moment).all():
        raise ValueError("the inputs' second moment is not finite")
    largest = moment.diagonal().max()
    if not largest > 0:
        raise ValueError("the inputs were all zero")
    if moment.diagonal().min() < 0 or (moment - moment.T).abs().max() > 1e-3 * largest:
        raise ValueError("the inputs' second moment is not symmetric, or negative")
    return moment


def _energy(weight: Tensor, seen: Tensor) -> float:
    """tr(W H W^T)."""
    return max(((weight @ seen) * weight).double().sum().item(), 0.0)
