"""Packing that makes up for its own error on a layer's inputs, in the tensors and the bytes that `pack` gives.

Rounding to the nearest code minimizes |W - Q|. What a layer gives out is wrong by (W - Q) x, whose mean square is
tr((W - Q) H (W - Q)^T), H the second moment of its inputs x. Three known steps bring that down:

1. A block's absmax is the one, up to its largest weight, with which it is rounded best.
2. GPTQ (arXiv 2210.17323): columns are rounded one after another, and those to come make up for what each lost.
3. Coordinate descent (QuantEase, arXiv 2309.01885): each absmax is fitted anew to its codes, each code chosen anew
   beside all others. Where absmax are stored as they are, no sweep makes the error larger.

Rows do not know of each other: a column of all of them is rounded at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosyq.quantize.formats import Format, dequantize, encode_state, state_key
from cosyq.quantize.grid import Grid
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


@dataclass(frozen=True)
class Adjusted:
    """What calibration made of a checkpoint's parameters.

    packed: weights, by module name.
    floats: learned float32 tensors on the host, by the names of module and parameter.
    """

    packed: dict[str, Calibrated] = field(default_factory=dict)
    floats: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def pack_calibrated(weight: Tensor, moment: Tensor, fmt: Format, device: torch.device) -> Calibrated:
    """Pack `weight` [out, in] (any float dtype) on `device` for inputs with the second moment `moment` [in, in].

    Where that is no better on such inputs than plain packing, the result is plain packing's.

    Raises:
        OverflowError: the format cannot hold a value of the weight, or the weight is not finite.
        ValueError: the moment is none, or a row of the weight is not whole blocks.
    """
    plain, plain_error = pack(weight, fmt, device)
    seen = _checked(moment, weight.shape[1]).to(device)
    expected = damped(seen)
    source = weight.to(device).float()
    grid = _grid(source, expected, fmt, {name: tensor.to(device) for name, tensor in plain.items()})
    cells, absmax = _swept(source, expected, grid, *_gptq(source, expected, grid))
    packed = {name: tensor.cpu() for name, tensor in grid.stored(cells, absmax).items()}
    before = weighted_error(plain, weight, moment, fmt, device)
    made = judged(packed, weight, moment, fmt, device, plain=before)
    return made if made.weighted < before else Calibrated(plain, plain_error, before, before)


def judged(
    tensors: dict[str, Tensor], weight: Tensor, moment: Tensor, fmt: Format, device: torch.device, *, plain: float
) -> Calibrated:
    """Packed tensors with the errors that they make; `plain` is plain packing's."""
    source = weight.to(device).float()
    error = relative_error(dequantize(fmt, tensors, tuple(weight.shape)).to(device) - source, source)
    return Calibrated(tensors, error, weighted_error(tensors, weight, moment, fmt, device), plain)


def damped(moment: Tensor) -> Tensor:
    """The second moment [in, in] to reckon with, of one that was seen."""
    return moment + torch.eye(len(moment), device=moment.device) * (moment.diagonal().mean() * DAMPING)


def weighted_error(
    tensors: dict[str, Tensor], weight: Tensor, moment: Tensor, fmt: Format, device: torch.device
) -> float:
    """The root of tr((W - Q) H (W - Q)^T) / tr(W H W^T), 0 where nothing comes of the inputs anyway."""
    source, seen = weight.to(device).float(), moment.to(device).float()
    lost = source - dequantize(fmt, tensors, tuple(weight.shape)).to(device)
    whole, missing = (((w @ seen) * w).double().sum().item() for w in (source, lost))
    return (max(missing, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _grid(source: Tensor, seen: Tensor, fmt: Format, plain: dict[str, Tensor]) -> Grid:
    """Of the plain tensors; under double quantization nested anew, for absmax as they will about be."""
    shape = (source.shape[0], source.shape[1])
    grid = Grid.of(plain, fmt, shape)
    if not fmt.double_quant:
        return grid
    parts = zip(source.T.contiguous().split(grid.block), seen.diagonal().split(grid.block), strict=True)
    absmax = torch.stack([_best_absmax(part, weights, grid) for part, weights in parts], dim=1)
    nested, offset = nest(absmax.reshape(-1))
    return Grid.of(plain | nested | {state_key(fmt): encode_state(fmt, shape, offset)}, fmt, shape)


def _best_absmax(part: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """The absmax [out] of a block [block, out] with the least squared error, each column's weighted by `weights`."""
    largest = part.abs().amax(0)
    best, least = largest, torch.full_like(largest, float("inf"))
    for share in SHRINK:
        absmax = largest * share
        error = weights @ (part - grid.levels[grid.nearest(part, absmax)] * absmax).square()
        best, least = torch.where(error < least, absmax, best), torch.minimum(error, least)
    return best


def _gptq(source: Tensor, seen: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Cells [out, in] and possible absmax [out, blocks]; a block's is searched for when its turn comes."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(seen.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    cost = upper.diagonal().square().reciprocal()  # of an error in a column, after those to come made up for it
    left = source.T.contiguous()  # from here on [in, out]: a column lies in one piece
    cells, absmax = torch.empty_like(left, dtype=torch.int64), source.new_empty(len(left) // grid.block, len(source))
    for start, end in _runs(len(left), grid.block):
        block = start // grid.block
        if start % grid.block == 0:
            span = slice(start, start + grid.block)
            absmax[block] = grid.possible(_best_absmax(left[span], cost[span], grid), block)
        scale, lost = absmax[block], source.new_empty(end - start, len(source))
        for column in range(start, end):
            cells[column] = grid.nearest(left[column], scale)
            error = (left[column] - grid.levels[cells[column]] * scale) / upper[column, column]
            left[column:end] -= upper[column, column:end, None] * error
            lost[column - start] = error
        left[end:] -= upper[start:end, end:].T @ lost
    return cells.T.contiguous(), absmax.T.contiguous()


def _swept(source: Tensor, seen: Tensor, grid: Grid, cells: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Both, after sweeps of coordinate descent."""
    wanted, cells, absmax = source.T.contiguous(), cells.T.contiguous(), absmax.T.contiguous()
    rounded = grid.levels[cells] * absmax.repeat_interleave(grid.block, dim=0)
    for start, end in _runs(len(wanted), grid.block) * SWEEPS:
        block = start // grid.block
        if start % grid.block == 0:
            span = slice(start, start + grid.block)
            levels = grid.levels[cells[span]]
            pull = (levels * (seen[span] @ (wanted - rounded))).sum(0)
            stiffness = (seen[span, span] @ levels * levels).sum(0)
            absmax[block] = grid.possible(absmax[block] + pull / torch.where(stiffness == 0, 1, stiffness), block)
            rounded[span] = levels * absmax[block]
        scale, own = absmax[block], seen[start:end, start:end]
        pulls = seen[start:end] @ (wanted - rounded)
        for column in range(start, end):
            at = column - start
            cells[column] = grid.nearest(rounded[column] + pulls[at] / own[at, at], scale)
            chosen = grid.levels[cells[column]] * scale
            pulls[at + 1 :] -= own[at + 1 :, at, None] * (chosen - rounded[column])
            rounded[column] = chosen
    return cells.T.contiguous(), absmax.T.contiguous()


def _runs(width: int, block: int) -> list[tuple[int, int]]:
    """Columns that are done together, first and last but one; none reaches over the end of a block."""
    ends = [(start, start + block) for start in range(0, width, block)]
    return [(at, min(at + TOGETHER, end)) for start, end in ends for at in range(start, end, TOGETHER)]


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
