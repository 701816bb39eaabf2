"""The kernels of the diffusion transformer, in Triton's interpreter, against torch's own expressions."""

import interpreter  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from cosyq.kernels import dit
from cosyq.model.dit import block_causal_mask, rope_tables, rotate_first
from cosyq.quantize.formats import block_scales, dequantize_blocks, dequantize_rows

LENGTHS = (70, 5)  # more than a tile, and less
HALF = 96  # frames of both and some that belong to none
HEADS, D = 2, 16
DIM = HEADS * D
EXACT = 2e-6  # float32 sums in another order


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def tiles(*blocks):
    return dit.tile_table(LENGTHS, blocks, 5)  # three, and two empty ones


def pasts(*rows, step=0, tails=0, frame=0):
    return dit.Pasts(torch.tensor(rows), torch.tensor([0, step]), tails, frame)


def no_past():
    return pasts(*[(0, 0, 0, 0)] * 5)


def sequences(x):
    """The rows of each sequence and branch of x [2 * HALF, ...], views."""
    for branch in range(2):
        yield from x[branch * HALF : branch * HALF + sum(LENGTHS)].split(LENGTHS)


def poisoned(*shape):
    """What is not written shows, and what is not to be read spoils the rest."""
    return torch.full(shape, float("nan"))


def rows(width):
    x = poisoned(2 * HALF, width)
    for part in sequences(x):
        part.normal_()
    return x


def assert_equal_rows(found, expected):
    for f, e in zip(sequences(found), expected, strict=True):
        assert relative(f, e) < EXACT


def test_a_tile_knows_its_sequence_and_block():
    assert dit.tile_table([65, 1], [50, 7], 4).tolist() == [
        [0, 0, 65, 50],
        [64, 0, 65, 50],
        [65, 65, 66, 7],
        [0, 0, 0, 1],
    ]


def test_rows_unpack():
    codes = torch.randint(-127, 128, (33, 160), dtype=torch.int8)
    scales, out = torch.rand(33), poisoned(33 * 160)
    dit.unpack_rows(codes.view(-1), scales, out)
    assert torch.equal(out.view(33, 160), dequantize_rows(codes, scales))


@pytest.mark.parametrize("double", [False, True])
def test_blocks_unpack(double):
    codes, levels, out = torch.randint(0, 256, (33 * 160,), dtype=torch.uint8), torch.randn(16), poisoned(33 * 320)
    scales, nested, groups = torch.rand(330), None, None  # more than one group of scales
    if double:
        scales, code, spread = torch.randint(0, 256, (330,), dtype=torch.uint8), torch.rand(256), torch.rand(2)
        nested, groups = (spread, code, 0.25), (code, torch.stack([spread, torch.full((2,), 0.25)], dim=1))
    dit.unpack_blocks(codes, scales, groups, levels, out)
    expected = dequantize_blocks(codes, levels, block_scales(scales, nested), 32, torch.Size((33, 320)))
    assert torch.equal(out.view(33, 320), expected)


def test_gelu_is_the_one_by_tanh():
    x, weight, bias, out = torch.randn(9, 24), torch.randn(40, 24), torch.randn(40), poisoned(9, 40)
    dit.linear_gelu(x, weight, bias, out)
    assert relative(out, F.gelu(F.linear(x, weight, bias), approximate="tanh")) < EXACT


@pytest.mark.parametrize("dim", [64, 80])
def test_norm_after_a_gated_sum(dim):
    x, y = torch.randn(8, dim) * 3 + 1, torch.randn(8, dim)
    gate, scale, shift, residual, out = (
        torch.randn(dim),
        torch.randn(dim),
        torch.randn(dim),
        x.clone(),
        poisoned(8, dim),
    )

    def normed(x):
        return F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift

    dit.add_norm(residual, None, scale, shift, out, 1e-6)
    assert torch.equal(residual, x)
    assert relative(out, normed(x)) < EXACT
    dit.add_norm(residual, (gate, y), scale, shift, out, 1e-6)
    assert relative(residual, x + gate * y) < EXACT
    assert relative(out, normed(x + gate * y)) < EXACT


def test_head_0_of_queries_and_keys_is_rotated_by_its_place():
    qkv, frequencies = rows(3 * DIM), torch.rand(D // 2)
    angles = torch.outer(torch.arange(HALF).float(), frequencies)
    expected = []
    for part in sequences(qkv.clone()):
        q, k, v = part.split(DIM, dim=1)
        rope = rope_tables(len(part), frequencies)
        expected.append(torch.cat([rotate_first(q[None], *rope)[0], rotate_first(k[None], *rope)[0], v], dim=1))
    dit.rotate(qkv, (angles.cos(), angles.sin()), tiles(1, 1), no_past())
    assert_equal_rows(qkv, expected)


def attended(qkv, blocks):
    expected = []
    for part, block in zip(sequences(qkv), blocks * 2, strict=True):
        q, k, v = part.view(-1, 3, HEADS, D).permute(1, 2, 0, 3)
        mask = block_causal_mask(len(part), block, part.device)
        expected.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).reshape(-1, DIM))
    return expected


@pytest.mark.parametrize("blocks", [(dit.EVERYWHERE, dit.EVERYWHERE), (9, dit.EVERYWHERE), (66, 2)], ids=str)
def test_attention_within_a_sequence_and_up_to_a_block(blocks):
    qkv, out = rows(3 * DIM), poisoned(2 * HALF, DIM)
    dit.attend(qkv, tiles(*blocks), no_past(), out, layer=0, heads=HEADS)
    assert_equal_rows(out, attended(qkv, blocks))


def test_attention_to_keys_far_above_the_first():
    """Weights relative to the first keys' are beyond float32."""
    qkv, out, everywhere = rows(3 * DIM), poisoned(2 * HALF, DIM), (dit.EVERYWHERE, dit.EVERYWHERE)
    for part in sequences(qkv):
        part[dit.KEYS :, DIM : 2 * DIM] *= 100
    dit.attend(qkv, tiles(*everywhere), no_past(), out, layer=0, heads=HEADS)
    for found, expected in zip(sequences(out), attended(qkv, everywhere), strict=True):
        assert relative(found, expected) < 1e-5  # scores are some hundred, with as many digits as others


@pytest.mark.parametrize("added", [False, True])
def test_causal_convolution_within_a_sequence(added):
    groups, taps, group = 2, 5, DIM // 2
    x, before, out = rows(DIM), rows(DIM), poisoned(2 * HALF, DIM)
    weight, bias = torch.randn(DIM, group, taps), torch.randn(DIM)
    expected = []
    for part, more in zip(sequences(x), sequences(before), strict=True):
        y = F.mish(F.conv1d(F.pad(part.T, (taps - 1, 0)), weight, bias, groups=groups)).T
        expected.append(y + more if added else y)
    laid_out = weight.view(groups, group, group, taps).permute(0, 3, 2, 1).contiguous()
    dit.conv_mish(x, laid_out, bias, before if added else None, tiles(1, 1), no_past(), out, which=0)
    assert_equal_rows(out, expected)


def test_mish_of_large_numbers():
    x, out = torch.tensor([[-200.0] * 16, [200.0] * 16]).repeat(32, 1), poisoned(64, 16)
    dit.conv_mish(
        x, torch.eye(16)[None, None], torch.zeros(16), None, dit.tile_table([32], [1], 1), no_past(), out, which=0
    )
    assert relative(out, F.mish(x)) < EXACT


def test_a_step_finds_what_is_of_it():
    """More numbers than one program copies."""
    table, row = torch.randn(4, 1100), poisoned(1100)
    dit.begin_step(torch.tensor([3, 1]), table, row)
    assert torch.equal(row, table[3])


def test_guided_step():
    x, velocity, given = torch.randn(10, 12), torch.randn(20, 12), torch.randn(20, 30)
    kept, conditional, free = given[:, 12:].clone(), velocity[:10], velocity[10:]
    expected = x + 0.3 * (1.7 * conditional - 0.7 * free)
    now = torch.tensor([5, 2])
    dit.guide(x, velocity, given, torch.tensor([0.3]), now, 0.7)
    assert now.tolist() == [6, 3]
    assert relative(x, expected) < EXACT
    assert torch.equal(given[:, :12], torch.cat([x, x]))
    assert torch.equal(given[:, 12:], kept)


@pytest.mark.parametrize("far", [1, 300])
def test_rows_go_on_from_what_is_kept_and_leave_their_own(far):
    """The second of two sequences, all at once and in three pieces: places, keys and what is convolved.

    The pieces are two tiles, less than one, and what is kept of neither; the first step's place in memory is spoiled.
    """
    layers, pieces, taps, groups, step = 2, (70, 20, 10), 5, 2, 1
    group, length = DIM // groups, sum(pieces)
    inputs, qkvs = torch.randn(2, 2, length, DIM), torch.randn(layers, 2, length, 3 * DIM)
    qkvs[:, :, 40:60, DIM : 2 * DIM] *= far
    weight, bias, frequencies = torch.randn(groups, taps, group, group), torch.randn(DIM), torch.rand(D // 2)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    sizes = {"tails": 2 * 2 * (taps - 1) * DIM, "frame": layers * 2 * 2 * DIM}

    def run(first, count, segments, into=None):
        """All kernels over some frames, of each convolution and layer, behind another sequence of five."""
        half, found = 5 + count, []
        listed = torch.tensor([(frames, memory.data_ptr()) for frames, memory in segments], dtype=torch.int64)
        mine = [first, len(segments), listed.data_ptr(), into.data_ptr() if into is not None else 0]
        table = dit.tile_table([5, count], [dit.EVERYWHERE, 10], 5)
        past = pasts(*[[0, 0, 0, 0] if t[1] == 0 else mine for t in table.tolist()], step=step, **sizes)
        for which, layer in ((0, 1), (1, 0)):
            x, qkv = torch.randn(2 * half, DIM), torch.randn(2 * half, 3 * DIM)
            x.view(2, half, -1)[:, 5:] = inputs[which, :, first : first + count]
            qkv.view(2, half, -1)[:, 5:] = qkvs[layer, :, first : first + count]
            convolved, attended = poisoned(2 * half, DIM), poisoned(2 * half, DIM)
            dit.conv_mish(x, weight, bias, None, table, past, convolved, which=which)
            dit.rotate(qkv, (angles.cos(), angles.sin()), table, past)
            dit.attend(qkv, table, past, attended, layer=layer, heads=HEADS)
            found.append(torch.cat([t.view(2, half, -1)[:, 5:] for t in (convolved, attended)], dim=2))
        return torch.stack(found)

    segments, parts, first = [], [], 0
    for count in pieces:
        into = poisoned(2, sizes["tails"] + count * sizes["frame"])
        parts.append(run(first, count, segments, into if first + count < length else None))
        segments.append((count, into))
        first += count
    assert relative(torch.cat(parts, dim=2), run(0, length, [])) < EXACT
    for _, memory in segments[:2]:
        assert memory[0].isnan().all()
        assert not memory[1].isnan().any()
