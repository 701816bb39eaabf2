"""The flow on a GPU: packed weights unpacked a block at a time, steps as CUDA graphs, utterances side by side.

A transformer block is four products by cuBLAS and four kernels (`kernels.dit`). The weights stay packed; every
evaluation unpacks a block into 16-bit scratch, small enough for the second-level cache, and multiplies by that; where
it is asked for, two of the products take int8 as it is stored (`kernels.flow_products`). One evaluation is a CUDA
graph, captured while the first of its length runs, so that even a first utterance gains by it. It finds on the device
which step it is, so replays follow one another with nothing between. All that a call says is sent as one copy; what is
made of that before the first step is a graph too, of all utterances together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from cosyq.kernels import dit as kernels
from cosyq.kernels.flow_products import times_codes
from cosyq.model.dit import NORM_EPS
from cosyq.model.flow import Flow, normalized, time_steps
from cosyq.quantize.linear import DequantLinear
from cosyq.runtime.flow_past import Segment, frame_numbers, tail_numbers, total
from cosyq.runtime.flow_room import BESIDE_ITS_OWN, Room, View, padded_tokens
from cosyq.runtime.flow_weights import Block, Codes, convolutions, scratch_places
from cosyq.runtime.look_ahead import look_ahead
from cosyq.runtime.recording import recorded

BUCKET = 64  # frames; lengths are rounded up to share graphs, and two branches to whole tiles of 128 rows
WHOLE = 20  # frames; the same for an utterance by itself that is not streamed
FINE = 768  # beyond so many, twice that
MANY = 1024  # tokens that keep the GPU busy while they are launched one by one
ROOM = 256  # frames; activations are held for a multiple of so many
GRAPHS = 128  # kept at most
MANY_BESIDE = 16  # utterances side by side that share graphs, with tiles to spare


@dataclass(frozen=True)
class Utterance:
    """What `Flow.forward` asks for; tensors on the host.

    past: what is kept of its first frames, the prompt's included; at most `SEGMENTS`.
    into: what is to be kept of the others.
    sent: frames behind the prompt's that are not asked for any more; `past` has none but those.
    """

    tokens: Tensor
    speaker: Tensor
    prompt_mel: Tensor
    streaming: bool
    final: bool
    past: tuple[Segment, ...] = ()
    into: Segment | None = None
    sent: int = 0

    @property
    def past_frames(self) -> int:
        return total(self.past)


class FusedFlow:
    """A `Flow`'s call, faster; for one thread at a time. Takes the flow apart: its estimator is used up.

    coded: int8 weights behind a norm are multiplied as they are stored, and what it gives is rounded to eight bits.
    """

    def __init__(self, flow: Flow, *, coded: bool = False):
        estimator, self.config = flow.estimator, flow.config
        self.dtype, self.device = estimator.dtype, estimator.proj_out.weight.device
        numbers = sorted(int(steps) for steps in flow.adaln)
        self._firsts = dict(zip(numbers, accumulate(numbers, initial=0), strict=False))  # rows of the table
        sizes = [torch.tensor(time_steps(steps)[1]).to(flow.adaln[str(steps)])[:, None] for steps in numbers]
        tables = [torch.cat([flow.adaln[str(n)].data, dt], dim=1) for n, dt in zip(numbers, sizes, strict=True)]
        self._table = torch.cat(tables)
        self._row = torch.empty(self.config.modulation_width + 1, device=self.device)
        self._frequencies = estimator.rope_frequencies.data.float().cpu()
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
        """The mel of each utterance after its prompt and what was sent, [mel, frames] float32; arguments as in
        `Flow.forward`. Who goes on from what it keeps must be solved on the same stream.

        What an utterance becomes depends on its neighbours by rounding at most.

        Raises:
            ValueError: one is longer than the noise.
        """
        view, lengths = self._begin(utterances, noise, steps)
        for _ in range(steps):
            self._launch(partial(self._step, view), (len(view.x), len(view.tiles)))
        found = zip(view.x[: sum(lengths)].split(lengths), utterances, strict=True)
        return [x[len(u.prompt_mel) + u.sent - u.past_frames :].T.clone() for x, u in found]

    def keep(self, tokens: Tensor, speaker: Tensor, prompt_mel: Tensor, noise: Tensor, *, steps: int) -> Segment:
        """What later calls need of a prompt's frames, which are whole blocks; arguments as in `Flow.forward`.

        The last `lookahead` of the tokens are only looked at.
        """
        into = self.segment(len(prompt_mel), steps)
        self.solve([Utterance(tokens, speaker, prompt_mel, True, False, into=into)], noise, steps=steps)
        return into

    def segment(self, frames: int, steps: int) -> Segment:
        """For what is to be kept."""
        return Segment.empty(self.config, frames, steps, dtype=self.dtype, device=self.device)

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
    def prepare(self, frames: int, noise: Tensor) -> None:
        """Capture the steps of up to `frames` frames, of one stream and of several, so that no call has to.

        There is room for longer ones, which would move what was captured, up to twice that.
        """
        if self._stream is None:
            return
        most = 2 * _padded(frames, whole=False)
        many = 2 * MANY_BESIDE
        room = self._reserve(most, _tiles(most, many), self.config.noise_frames, many)
        for utterances in (1, MANY_BESIDE, many):
            for count in sorted({padded_tokens(tokens) for tokens in range(1, MANY + 1)}):
                self._tell(room, count, utterances, noise)
            for half in sorted({_padded(length, whole=False) for length in range(1, frames + 1)}):
                view = room.view(half, _tiles(half, utterances))
                room.sheet.memory.zero_()
                self._launch(partial(self._step, view), (half, len(view.tiles)))

    def _begin(self, utterances: Sequence[Utterance], noise: Tensor, steps: int) -> tuple[View, list[int]]:
        """All that comes before the first step, and how many frames each utterance has in the view."""
        c = self.config
        ends = [c.token_mel_ratio * (len(u.tokens) - (0 if u.final else c.lookahead)) for u in utterances]
        if max(ends) > noise.shape[0]:
            raise ValueError(f"{max(ends)} frames asked for, the fixed noise covers {noise.shape[0]}")
        lengths = [end - u.past_frames for end, u in zip(ends, utterances, strict=True)]
        whole = len(utterances) == 1 and not utterances[0].streaming
        half, beside = _padded(sum(lengths), whole=whole), _beside(len(utterances))
        room = self._reserve(half, _tiles(half, len(utterances)), max(ends), beside)
        view = room.view(half, _tiles(half, len(utterances)))
        sheet = room.blank()
        sheet.now[:3] = self._firsts[steps], 0, half
        tile = token = prompt = 0
        for index, (u, end, length) in enumerate(zip(utterances, ends, lengths, strict=True)):
            own = u.past_frames // c.token_mel_ratio
            tokens, mel = u.tokens[max(own - BESIDE_ITS_OWN, 0) :], u.prompt_mel[u.past_frames : end]
            sheet.tokens[token : token + len(tokens)] = tokens.cpu().numpy()
            sheet.speakers[index] = normalized(u.speaker.cpu()).numpy()
            sheet.prompts[prompt : prompt + len(mel)] = mel.cpu().numpy()
            of_it = slice(tile, tile + -(-length // kernels.TILE))
            sheet.entries[of_it] = u.past_frames, token + min(own, BESIDE_ITS_OWN), prompt, len(mel), index
            for place, segment in enumerate(u.past):
                sheet.lists[index, place] = segment.frames, segment.memory.data_ptr()
            into = u.into.memory.data_ptr() if u.into is not None else 0
            sheet.pasts[of_it] = u.past_frames, len(u.past), room.list_of(index), into
            tile, token, prompt = of_it.stop, token + len(tokens) + c.lookahead, prompt + len(mel)
        blocks = [c.chunk_frames if u.streaming else kernels.EVERYWHERE for u in utterances]
        sheet.tiles[:] = kernels.tile_table(lengths, blocks, room.tiles).numpy()
        room.send(sheet, prompt)
        self._tell(room, padded_tokens(token - c.lookahead), beside, noise)
        return view, lengths

    def _reserve(self, half: int, tiles: int, positions: int, utterances: int) -> Room:
        room = self._room
        asked = (half, tiles, positions, utterances)
        there = (room.half, room.tiles, room.positions, room.utterances) if room else (0, 0, 0, 0)
        if room is None or any(a > b for a, b in zip(asked, there, strict=True)):
            self._forget(len(self._graphs))  # they hold addresses
            frames = max(-(-half // ROOM) * ROOM, there[0])
            count = max(2 * frames // kernels.TILE, tiles, there[1])
            places = max(frames, -(-positions // ROOM) * ROOM, there[2])
            most = max(utterances, there[3])
            self._room = room = None  # freed before its successor is allocated
            self._room = room = Room(
                self.config, frames, count, places, most, self._frequencies, self.dtype, self.device
            )
        return room

    def _tell(self, room: Room, count: int, utterances: int, noise: Tensor) -> None:
        """What the estimator is given, of all utterances: as many tokens at most, and what is in the sheet."""
        work = partial(self._enter, room, count, utterances, noise)
        if count > MANY:
            work()
        else:
            self._launch(work, ("enter", count, utterances, noise.data_ptr()))

    def _enter(self, room: Room, count: int, utterances: int, noise: Tensor) -> None:
        front, sheet, ratio = self._front, room.sheet, self.config.token_mel_ratio
        tokens = sheet.tokens[:count]
        there = (tokens >= 0)[:, None]
        embedded = front.token_embedding(tokens.clamp(min=0)).float() * there
        encoded = look_ahead(front.token_encoder, embedded, there)
        voices = front.told_of(sheet.speakers[:utterances])
        tiles = sheet.tiles[: ratio * count // kernels.TILE + 1 + utterances]
        kernels.enter(
            room.x, room.given, noise, encoded, voices, sheet.prompts, tiles, sheet.entries, sheet.now, ratio=ratio
        )

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
        current = torch.cuda.current_stream(self.device)
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # graphs take turns
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph = recorded(work, pool)
            graph.replay()
        current.wait_stream(stream)
        return graph

    def _forget(self, graphs: int) -> None:
        """Let the oldest go."""
        if graphs:
            torch.cuda.synchronize(self.device)  # none may be running
        for key in list(self._graphs)[:graphs]:
            del self._graphs[key]

    def _step(self, v: View) -> None:
        """x moves by one step, of the timestep whose turn it is."""
        c, blocks = self.config, self._blocks
        rows = self._row[: 6 * c.depth * c.dim].view(c.depth, 6, c.dim)
        last_scale, last_shift, dt = self._row[6 * c.depth * c.dim :].split([c.dim, c.dim, 1])
        pasts = kernels.Pasts(v.pasts, v.now, tail_numbers(c), frame_numbers(c))
        (first, first_bias), (second, second_bias) = self._convolutions
        kernels.begin_step(v.now, self._table, self._row)
        _product(v.given, self._entry.weight, self._entry.bias, v.change)
        kernels.conv_mish(v.change, first, first_bias, None, v.tiles, pasts, v.normed, which=0)
        kernels.conv_mish(v.normed, second, second_bias, v.change, v.tiles, pasts, v.residual, which=1)
        kernels.add_norm(v.residual, None, rows[0, 1], rows[0, 0], _input(v, blocks[0].qkv), NORM_EPS)
        for index, block in enumerate(blocks):
            _, _, gate_a, shift_f, scale_f, gate_f = rows[index]
            block.unpack("attention")
            if isinstance(block.qkv, Codes):
                times_codes(v.coded, block.qkv.matrix, block.qkv_bias, v.qkv)
            else:
                _product(v.normed, block.qkv, block.qkv_bias, v.qkv)
            kernels.rotate(v.qkv, v.rope, v.tiles, pasts)
            kernels.attend(v.qkv, v.tiles, pasts, v.context, layer=index, heads=c.heads)
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
        kernels.guide(v.x, v.velocity, v.given, dt, v.now, c.guidance)


def _padded(frames: int, *, whole: bool) -> int:
    """Lengths that share graphs: of many frames few, since one takes as long to capture as a step to launch.

    whole: of one utterance that is not streamed.
    """
    bucket = WHOLE if whole else BUCKET
    step = bucket if frames <= FINE else 2 * bucket
    return -(-frames // step) * step


def _beside(utterances: int) -> int:
    """Numbers of utterances that share graphs."""
    return 1 if utterances == 1 else max(MANY_BESIDE, 1 << (utterances - 1).bit_length())


def _tiles(half: int, utterances: int) -> int:
    """At least as many as so many utterances have, the last of each perhaps not full."""
    return half // kernels.TILE + _beside(utterances)


def _input(v: View, weight: Tensor | Codes) -> Tensor | tuple[Tensor, Tensor]:
    """Where a norm leaves what a matrix is multiplied by."""
    return v.coded if isinstance(weight, Codes) else v.normed


def _product(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias, x, weight.T, out=out)
