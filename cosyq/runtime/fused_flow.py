"""The flow on a GPU: packed weights unpacked a block at a time, steps as CUDA graphs, utterances side by side.

A transformer block is four products by cuBLAS and four kernels (`kernels.dit`). The weights stay packed; every
evaluation unpacks a block into 16-bit scratch, small enough for the second-level cache, and multiplies by that; where
it is asked for, two of the products take int8 as it is stored (`kernels.flow_products`). One evaluation is a CUDA
graph, captured while the first of its length runs, so that even a first utterance gains by it. What changes from step
to step, the timestep's modulation and size, is copied in before each replay. What comes before the first step is a
graph too: launched one by one, its kernels would take as long as a step of a short utterance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosyq.kernels import dit as kernels
from cosyq.kernels.flow_products import times_codes
from cosyq.model.dit import NORM_EPS
from cosyq.model.flow import Flow, time_steps
from cosyq.quantize.linear import DequantLinear
from cosyq.runtime.flow_past import Past, tail_numbers
from cosyq.runtime.flow_room import TOKENS, Room, Told, View
from cosyq.runtime.flow_weights import Block, Codes, convolutions, scratch_places
from cosyq.runtime.look_ahead import look_ahead
from cosyq.runtime.transfer import sent

BUCKET = 64  # frames; lengths are rounded up to share graphs, and two branches to whole tiles of 128 rows
FINE = 768  # beyond so many, twice that
MANY = 512  # tokens that keep the GPU busy while they are launched one by one
ROOM = 256  # frames; activations are held for a multiple of so many
GRAPHS = 128  # kept at most
MANY_BESIDE = 16  # utterances side by side that share graphs, with tiles to spare
_Keep = tuple[Tensor, Tensor]  # where to put what a `Past` has of a step: its tails, its keys and values


@dataclass(frozen=True)
class Utterance:
    """What `Flow.forward` asks for; tensors on the device. `past` is of its prompt's begin, if that was kept."""

    tokens: Tensor
    speaker: Tensor
    prompt_mel: Tensor
    streaming: bool
    final: bool
    past: Past | None = None

    @property
    def past_frames(self) -> int:
        return 0 if self.past is None else self.past.frames


class FusedFlow:
    """A `Flow`'s call, faster; for one thread at a time. Takes the flow apart: its estimator is used up.

    coded: int8 weights behind a norm are multiplied as they are stored, and what it gives is rounded to eight bits.
    """

    def __init__(self, flow: Flow, *, coded: bool = False):
        estimator, self.config = flow.estimator, flow.config
        self.dtype, self.device = estimator.dtype, estimator.proj_out.weight.device
        self._tables = {
            int(steps): torch.cat([table.data, torch.tensor(time_steps(int(steps))[1]).to(table)[:, None]], dim=1)
            for steps, table in flow.adaln.items()
        }
        self._row = torch.empty(self.config.modulation_width + 1, device=self.device)
        self._frequencies = estimator.rope_frequencies.data.float()
        self._entry, self._exit = estimator.input_proj, estimator.proj_out
        self._convolutions = convolutions(estimator.conv_pos)
        packed = any(isinstance(layer, DequantLinear) for layer in estimator.blocks.modules())
        scratch = torch.empty(
            max(p.stop for p in scratch_places(self.config)) if packed else 0, dtype=self.dtype, device=self.device
        )
        self._blocks: list[Block] = []
        for index in range(self.config.depth):  # one by one, so that only one is there twice
            self._blocks.append(Block.of(estimator.blocks[index], self.config, scratch, coded=coded))
            estimator.blocks[index] = nn.Identity()
        self._front = flow  # its token encoder and speaker projection remain
        del flow.estimator, flow.adaln
        self._room: Room | None = None
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        # What is captured cannot be on the default stream.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(
        self,
        tokens: Tensor,
        speaker: Tensor,
        prompt_mel: Tensor,
        noise: Tensor,
        *,
        streaming: bool,
        final: bool,
        steps: int,
    ) -> Tensor:
        """As `Flow.forward`, but launched as a whole: nothing is called between the steps."""
        alone = Utterance(tokens, speaker, prompt_mel, streaming, final)
        return self.solve([alone], noise, steps=steps)[0]

    @torch.inference_mode()
    def solve(self, utterances: Sequence[Utterance], noise: Tensor, *, steps: int) -> list[Tensor]:
        """The mel of each utterance after its prompt, [mel, frames - p] float32; arguments as in `Flow.forward`.

        What an utterance becomes depends on its neighbours by rounding at most.

        Raises:
            ValueError: one is longer than the noise.
        """
        table = self._tables[steps]
        ratio, ahead = self.config.token_mel_ratio, self.config.lookahead
        ends = [ratio * (len(u.tokens) - (0 if u.final else ahead)) for u in utterances]
        longest = max(ends)
        if longest > noise.shape[0]:
            raise ValueError(f"{longest} frames asked for, the fixed noise covers {noise.shape[0]}")
        lengths = [end - u.past_frames for end, u in zip(ends, utterances, strict=True)]
        half = _padded(sum(lengths))
        tiles = _tiles(half, len(utterances))
        blocks = [self.config.chunk_frames if u.streaming else kernels.EVERYWHERE for u in utterances]
        view = self._view(half, tiles, longest)
        view.tiles.copy_(sent(kernels.tile_table(lengths, blocks, tiles), self.device))
        pasts = sent(_past_table([u.past for u in utterances], lengths, tiles, steps), self.device)
        first = 0
        view.clear()
        for u, start, length in zip(utterances, (u.past_frames for u in utterances), lengths, strict=True):
            told = self._told(u.tokens, u.speaker)
            view.begin(first, slice(start, start + length), noise, u.prompt_mel, told)
            first += length
        for row, past in zip(table, pasts, strict=True):
            self._row.copy_(row)
            view.pasts.copy_(past)
            self._launch(lambda: self._step(view), (half, tiles))
        found = view.x[: sum(lengths)].split(lengths)
        return [x[len(u.prompt_mel) - u.past_frames :].T.clone() for x, u in zip(found, utterances, strict=True)]

    @torch.inference_mode()
    def keep(self, tokens: Tensor, speaker: Tensor, prompt_mel: Tensor, noise: Tensor, *, steps: int) -> Past:
        """What later calls need of a prompt's frames, which are whole blocks; arguments as in `Flow.forward`.

        The last `lookahead` of the tokens are only looked at.
        """
        frames = self.config.token_mel_ratio * (len(tokens) - self.config.lookahead)
        half = _padded(frames)
        tiles = _tiles(half, 1)
        view = self._view(half, tiles, frames)
        view.tiles.copy_(sent(kernels.tile_table([frames], [self.config.chunk_frames], tiles), self.device))
        view.pasts.zero_()
        view.clear()
        view.begin(0, slice(0, frames), noise, prompt_mel, self._told(tokens, speaker))
        past = Past.empty(self.config, frames, steps, dtype=self.dtype, device=self.device)
        now = Past.empty(self.config, frames, 1, dtype=self.dtype, device=self.device)
        keep = now.tails(self.config, 0), now.keys_and_values(self.config, 0)
        graph = None
        for step, row in enumerate(self._tables[steps]):
            self._row.copy_(row)
            if graph is not None:
                graph.replay()
            elif self._stream is not None:
                graph = self._do_and_capture(lambda: self._step(view, keep), self._stream)
            else:
                self._step(view, keep)
            past.memory[step].copy_(now.memory[0])
        return past

    def unpack(self, room: int) -> int:
        """Unpack the weights for good, if they fit `room` bytes; returns the bytes taken. The mel is the same."""
        size = sum(block.scratch_bytes for block in self._blocks)
        if not 0 < size <= room:
            return 0
        self._forget(len(self._graphs))
        for index, block in enumerate(self._blocks):  # one by one, so that only one is there twice
            self._blocks[index] = block.unpacked()
        return size

    @torch.inference_mode()
    def prepare(self, frames: int) -> None:
        """Capture the steps of up to `frames` frames, of one utterance and of several, so that no call has to.

        There is room for longer ones, which would move what was captured, up to twice that.
        """
        if self._stream is None:
            return
        most = 2 * _padded(frames)
        self._view(most, _tiles(most, MANY_BESIDE), self.config.noise_frames)
        for count in range(TOKENS, MANY + 1, TOKENS):
            self._told(torch.zeros(count, dtype=torch.int64), torch.ones(self.config.speaker_dim))
        for half in sorted({_padded(length) for length in range(1, frames + 1)}):
            for utterances in (1, MANY_BESIDE):
                tiles = _tiles(half, utterances)
                view = self._view(half, tiles, half)
                view.tiles.zero_()
                view.clear()
                self._row.zero_()
                self._launch(partial(self._step, view), (half, tiles))

    def _view(self, half: int, tiles: int, positions: int) -> View:
        room = self._room
        if room is None or half > room.half or tiles > room.tiles or positions > room.positions:
            self._forget(len(self._graphs))  # they hold addresses
            frames = max(-(-half // ROOM) * ROOM, room.half if room else 0)
            count = max(2 * frames // kernels.TILE, tiles, room.tiles if room else 0)
            places = max(frames, -(-positions // ROOM) * ROOM, room.positions if room else 0)
            self._room = room = None  # freed before its successor is allocated
            self._room = room = Room(self.config, frames, count, places, self._frequencies, self.dtype)
        return room.view(half, tiles)

    def _told(self, tokens: Tensor, speaker: Tensor) -> Told:
        """What the front makes of an utterance; valid until the next one's."""
        assert self._room is not None
        count = -(-len(tokens) // TOKENS) * TOKENS
        told = self._room.told(count)
        told.tokens[: len(tokens)] = tokens
        told.tokens[len(tokens) :] = -1
        told.speaker.copy_(speaker)
        if count > MANY:
            self._encode(told)
        else:
            self._launch(lambda: self._encode(told), ("front", count))
        return told

    def _encode(self, told: Told) -> None:
        front, there = self._front, (told.tokens >= 0)[:, None]
        embedded = front.token_embedding(told.tokens.clamp(min=0)).float() * there
        encoded = look_ahead(front.token_encoder, embedded)  # zeros follow the last token, one way or the other
        told.encoded.copy_(encoded.repeat_interleave(self.config.token_mel_ratio, dim=0))
        told.voice.copy_(front.voice(told.speaker))

    def _launch(self, work: Callable[[], None], key: tuple[Any, ...]) -> None:
        """Do it, as a graph if it was done before."""
        if self._stream is None:
            work()
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            if len(self._graphs) == GRAPHS:
                self._forget(GRAPHS // 2)
            self._graphs[key] = self._do_and_capture(work, self._stream)

    def _do_and_capture(self, work: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """Capture work, and launch it behind what the current stream holds."""
        current, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # graphs take turns
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # torch.cuda.graph would collect garbage, wait for the device and empty the allocator's cache.
            graph.capture_begin(pool, capture_error_mode="relaxed")  # as loading a kernel may need
            try:
                work()
            finally:
                graph.capture_end()
            graph.replay()
        current.wait_stream(stream)
        return graph

    def _forget(self, graphs: int) -> None:
        """Let the oldest go."""
        if graphs:
            torch.cuda.synchronize(self.device)  # none may be running
        for key in list(self._graphs)[:graphs]:
            del self._graphs[key]

    def _step(self, v: View, keep: _Keep | None = None) -> None:
        """x moves by one step of the timestep in `_row`.

        keep: of a sequence that is alone.
        """
        c, blocks = self.config, self._blocks
        rows = self._row[: 6 * c.depth * c.dim].view(c.depth, 6, c.dim)
        last_scale, last_shift, dt = self._row[6 * c.depth * c.dim :].split([c.dim, c.dim, 1])
        (first, first_bias), (second, second_bias) = self._convolutions
        _product(v.given, self._entry.weight, self._entry.bias, v.change)
        kernels.conv_mish(v.change, first, first_bias, None, v.tiles, v.pasts, v.normed, which=0)
        kernels.conv_mish(v.normed, second, second_bias, v.change, v.tiles, v.pasts, v.residual, which=1)
        if keep is not None:
            tails, frames = keep[0], keep[1].shape[2]
            for tail, read in zip(tails, (v.change, v.normed), strict=True):
                tail.copy_(_branches(read, frames)[:, frames - tail.shape[1] :])
        kernels.add_norm(v.residual, None, rows[0, 1], rows[0, 0], _input(v, blocks[0].qkv), NORM_EPS)
        for index, block in enumerate(blocks):
            _, _, gate_a, shift_f, scale_f, gate_f = rows[index]
            block.unpack("attention")
            if isinstance(block.qkv, Codes):
                times_codes(v.coded, block.qkv.matrix, block.qkv_bias, v.qkv)
            else:
                _product(v.normed, block.qkv, block.qkv_bias, v.qkv)
            kernels.rotate(v.qkv, v.rope, v.tiles, v.pasts)
            if keep is not None:
                keep[1][index].copy_(_branches(v.qkv, keep[1].shape[2])[:, :, c.heads * c.head_dim :])
            kernels.attend(v.qkv, v.tiles, v.pasts, v.context, layer=index, tails=tail_numbers(c), heads=c.heads)
            block.unpack("feed-forward")
            _product(v.context, block.out, block.out_bias, v.change)
            kernels.add_norm(v.residual, (gate_a, v.change), scale_f, shift_f, _input(v, block.up), NORM_EPS)
            if isinstance(block.up, Codes):
                times_codes(v.coded, block.up.matrix, block.up_bias, v.hidden, gelu=True)
            else:
                kernels.linear_gelu(v.normed, block.up, block.up_bias, v.hidden)
            _product(v.hidden, block.down, block.down_bias, v.change)
            scale, shift = (rows[index + 1, 1], rows[index + 1, 0]) if index + 1 < c.depth else (last_scale, last_shift)
            into = _input(v, blocks[index + 1].qkv) if index + 1 < c.depth else v.normed
            kernels.add_norm(v.residual, (gate_f, v.change), scale, shift, into, NORM_EPS)
        _product(v.normed, self._exit.weight, self._exit.bias, v.velocity)
        kernels.guide(v.x, v.velocity, v.given, dt, c.guidance)


def _padded(frames: int) -> int:
    """Lengths that share graphs: of many frames few, since one takes as long to capture as a step to launch."""
    step = BUCKET if frames <= FINE else 2 * BUCKET
    return -(-frames // step) * step


def _tiles(half: int, utterances: int) -> int:
    """At least as many as so many utterances have, the last of each perhaps not full."""
    spare = 1 if utterances == 1 else max(MANY_BESIDE, 1 << (utterances - 1).bit_length())
    return half // kernels.TILE + spare


def _past_table(pasts: Sequence[Past | None], lengths: Sequence[int], tiles: int, steps: int) -> Tensor:
    """`kernels.dit`'s of every step, [steps, tiles, 2] int64 on the host."""
    table = torch.zeros(steps, tiles, 2, dtype=torch.int64)
    first = 0
    for past, length in zip(pasts, lengths, strict=True):
        last = first + -(-length // kernels.TILE)
        if past is not None:
            table[:, first:last, 0] = past.frames
            table[:, first:last, 1] = torch.tensor([past.address(step) for step in range(steps)])[:, None]
        first = last
    return table


def _branches(rows: Tensor, frames: int) -> Tensor:
    """The first frames of each half of rows [n, width], [2, frames, width]."""
    return rows.view(2, -1, rows.shape[1])[:, :frames]


def _input(v: View, weight: Tensor | Codes) -> Tensor | tuple[Tensor, Tensor]:
    """Where a norm leaves what a matrix is multiplied by."""
    return v.coded if isinstance(weight, Codes) else v.normed


def _product(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias, x, weight.T, out=out)
