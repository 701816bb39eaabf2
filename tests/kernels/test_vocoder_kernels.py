"""Each kernel against torch, in Triton's interpreter. What may not be read or must be written starts as NaN."""

import math

import interpreter  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from random_vocoder import SMALL, random_vocoder

from cosyq.kernels.excitation import PitchLayer, excite, pitch_conv, transform
from cosyq.kernels.streaming import MARGIN, Extent, Rows
from cosyq.kernels.vocoder import Activation, Conv, conv, mix, note_infinite, overlap_add
from cosyq.model.vocoder import StreamState, excitation_noise, hann, snake
from cosyq.runtime.vocoder_weights import pack

NAN = math.nan


def counts(frames, *, first=False, final=False, noise=0):
    return torch.tensor([frames, first, final, noise], dtype=torch.int32)


def written(groups, rows, channels, past, dtype=torch.float32):
    """A buffer that nothing has been written to, behind tails of `past` rows a group."""
    tail = torch.randn(sum(past) * channels, dtype=dtype)
    return Rows(torch.full((groups, MARGIN + rows, channels), NAN, dtype=dtype), tail, torch.full_like(tail, NAN))


def holds(rows, group, past, n, expected, offset=0, tolerance=1e-5):
    """Old tail, the n expected rows and nothing else lie in the buffer; the new tail is the end of these."""
    channels = rows.data.shape[-1]
    here = slice(offset * channels, (offset + past) * channels)
    joined = torch.cat([rows.tail_in[here].view(past, channels), expected.to(rows.data.dtype)])
    found = rows.data[group]
    assert relative(found[MARGIN - past : MARGIN + n], joined) < tolerance
    assert found[: MARGIN - past].isnan().all()
    assert found[MARGIN + n :].isnan().all()
    assert relative(rows.tail_out[here].view(past, channels), joined[n:]) < tolerance


def layer(inputs, outputs, taps, stride=1):
    weight = torch.randn(sum(taps), inputs, outputs) / math.sqrt(inputs * max(taps))
    return Conv(weight, torch.randn(len(taps), outputs), taps, stride)


def convolved(x, weight, bias, **options):
    """Rows x [t, inputs], weight [taps, inputs, outputs] -> [t', outputs]."""
    return F.conv1d(x.T[None], weight.permute(2, 1, 0), bias, **options)[0].T


@pytest.mark.parametrize("frames", [1, 5])  # fewer rows than a tail has, and more than one tile
def test_side_by_side_convolutions_with_residual_and_snake(frames):
    rate, channels, taps, dilation, next_dilation = 15, 32, (5, 3), 2, 6
    n, rows = frames * rate, Extent(6, rate)
    convs = layer(channels, channels, taps)
    x = torch.randn(2, MARGIN + rows.most, channels)
    x[:, MARGIN + n :] = NAN
    residual, alpha = torch.randn(1, rows.most, channels), torch.rand(2, channels) + 0.5
    pasts = [(t - 1) * next_dilation for t in taps]
    into, raw = written(2, rows.most, channels, pasts), torch.full((2, rows.most, channels), NAN)
    conv(
        Rows(x, x[:0], x[:0]), convs, counts(frames), rows=rows, dilation=dilation, residual=residual, raw=raw,
        act=Activation(into, taps, next_dilation, alpha=alpha),
    )  # fmt: skip
    for g, t in enumerate(taps):
        seen = x[g, MARGIN - (t - 1) * dilation : MARGIN + n]
        weight = convs.weight[sum(taps[:g]) : sum(taps[:g]) + t]
        expected = residual[0, :n] + convolved(seen, weight, convs.bias[g], dilation=dilation)
        assert relative(raw[g, :n], expected) < 1e-5
        assert raw[g, n:].isnan().all()
        holds(into, g, pasts[g], n, snake(expected.T, alpha[g]).T, offset=sum(pasts[:g]))


@pytest.mark.parametrize("first", [True, False])
def test_one_output_for_several_readers_with_a_reflected_row(first):
    frames, rate, taps = 2, 20, (5, 3)
    n, rows = frames * rate + first, Extent(3, rate, extra=True)
    convs = layer(16, 32, (3,))
    x = torch.randn(1, MARGIN + rows.most, 16)
    other, alpha = torch.randn(rows.most, 32), torch.rand(2, 32) + 0.5
    into = written(2, rows.most, 32, [4, 2])
    conv(
        Rows(x, x[:0], x[:0]), convs, counts(frames, first=first), rows=rows, other=other, act=Activation(into, taps, alpha=alpha)
    )  # fmt: skip
    shifted = torch.cat([other[1:2], other]) if first else other
    expected = convolved(x[0, MARGIN - 2 : MARGIN + n], convs.weight, convs.bias[0]) + shifted[:n]
    for g, past in enumerate((4, 2)):
        holds(into, g, past, n, snake(expected.T, alpha[g]).T, offset=4 * g)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
def test_strided_convolution(stride, first):
    """The first chunk has an input row more and stride - 1 rows of zeros in front, as `StridedConv` puts them."""
    frames, rate = 2, 4
    n, rows = frames * rate, Extent(3, rate)
    convs = layer(16, 16, (2 * stride if stride > 1 else 1,), stride)
    x = torch.randn(1, MARGIN + 3 * rate * stride + 1, 16)
    raw = torch.full((1, rows.most, 16), NAN)
    conv(Rows(x, x[:0], x[:0]), convs, counts(frames, first=first), rows=rows, raw=raw)
    past = (stride - first) if stride > 1 else 0
    seen = x[0, MARGIN - past : MARGIN + n * stride + first * (stride > 1)]
    assert relative(raw[0, :n], convolved(seen, convs.weight, convs.bias[0], stride=stride)) < 1e-5


@pytest.mark.parametrize("frames", [1, 30])
def test_mean_of_blocks(frames):
    raw, rows = torch.randn(3, 90, 32), Extent(30, 3)
    into = written(1, 90, 32, [6])
    mix(raw, counts(frames), rows=rows, act=Activation(into, (7,), slope=0.2))
    holds(into, 0, 6, 3 * frames, F.leaky_relu(raw.mean(0)[: 3 * frames], 0.2))


@pytest.mark.parametrize("first", [True, False])
def test_pitch_layer_looks_ahead(first):
    weight, scale, bias = torch.randn(3, 16, 32), torch.rand(32).double(), torch.randn(32).double()
    mel, into = torch.randn(24, 16), written(1, 21, 32, [2], torch.float64)
    pitch_conv(mel, PitchLayer(weight, scale, bias), counts(19, first=first), rows=21, past=2, into=into)
    seen = mel[0 if first else 1 : 22].double()
    expected = F.elu(convolved(seen, weight.double(), None) * scale + bias)
    holds(into, 0, 2, 19 + first, expected, tolerance=1e-14)


@pytest.mark.parametrize("n", [1, 20])
def test_pitch_layer_looks_back(n):
    weight, scale, bias = torch.randn(3, 32, 32), torch.rand(32).double(), torch.randn(32).double()
    x, into = torch.randn(1, MARGIN + 21, 32).double(), written(1, 21, 32, [2], torch.float64)
    pitch_conv(Rows(x, x[:0], x[:0]), PitchLayer(weight, scale, bias), counts(n), rows=21, past=2, into=into)
    seen = x[0, MARGIN - 2 : MARGIN + n]
    expected = F.elu(convolved(seen, weight.double(), None) * scale + bias)
    holds(into, 0, 2, n, expected, tolerance=1e-14)


def test_excitation_equals_the_references():
    """Three chunks through the kernels against one call, minutes into an utterance, voiced and unvoiced."""
    vocoder = random_vocoder(SMALL)
    c, source, weights = SMALL, vocoder.source, pack(vocoder, torch.float32)
    f0 = torch.rand(1, 14) * 300 * (torch.arange(14) % 3 > 0)
    noise = excitation_noise(0, 14, c.harmonics + 1, c.samples_per_frame)
    phase = torch.rand(1, 1, c.harmonics + 1).double() * 200
    state = StreamState()
    state.put("phase", phase)
    signal = source.run(f0, noise, state)[0]

    hidden = torch.zeros(1, MARGIN + 14, 16, dtype=torch.float64)
    weights.source.classifier.copy_(F.one_hot(torch.tensor(0), len(weights.source.classifier)))
    weights.source.classifier_bias.zero_()
    merged = noise @ source.linear.weight[0]
    carried = F.pad(phase.flatten(), (0, 16 - phase.shape[-1]))
    tail, begin, found = torch.zeros(4), 0, []
    for n in (1, 5, 8):
        hidden[0, MARGIN : MARGIN + n, 0] = f0[0, begin : begin + n]
        x = Rows(hidden[:, :, : len(weights.source.classifier)].contiguous(), tail[:0], tail[:0])
        into = Rows(torch.full((1, MARGIN + 14, 2), NAN), tail, torch.full_like(tail, NAN))
        after = torch.full_like(carried, NAN)
        excite(x, weights.source, counts(n), rows=14, f0=torch.zeros(14), into=into, phase=(carried, after))
        frames = into.data[0, MARGIN : MARGIN + n].repeat_interleave(c.samples_per_frame, 0)
        part = merged[begin * c.samples_per_frame : (begin + n) * c.samples_per_frame]
        found.append(torch.tanh(frames[:, 0] + frames[:, 1] * part))
        tail, carried, begin = into.tail_out, after, begin + n
    assert relative(torch.cat(found), signal) < 1e-6
    assert relative(carried[: phase.shape[-1]], state.take("phase").flatten()) < 1e-14


def test_transform_equals_a_centred_stft():
    """An utterance of nine frames in chunks of 2, 3 and 4; every chunk but the last is given one frame ahead."""
    c, total = SMALL, 9
    size = c.samples_per_frame
    weights = pack(random_vocoder(SMALL), torch.float32)
    frames, noise = torch.randn(total, 2) * 0.3, torch.randn(total * size)
    signal = torch.tanh(frames[:, 0].repeat_interleave(size) + frames[:, 1].repeat_interleave(size) * noise)
    expected = torch.stft(signal, c.n_fft, c.hop, window=hann(c.n_fft, signal), return_complex=True)
    expected = torch.cat([expected.real, expected.imag]).T
    begin, tail = 0, None
    for count in (2, 3, 4):
        first, final = begin == 0, begin + count == total
        n = count * c.stft_per_frame + first
        ahead = torch.zeros(1, MARGIN + 5, 2)
        known = frames[max(begin - 1, 0) : begin + count + (not final)]
        at = MARGIN if first else MARGIN - 2
        ahead[0, at : at + len(known)] = known
        into = written(1, 4 * c.stft_per_frame + 1, 32, [3])
        if tail is not None:
            into.tail_in.copy_(tail)
        transform(
            Rows(ahead, tail, tail), F.pad(noise, (7, 0)), weights.basis, counts(count, first=first, final=final, noise=7 + begin * size),
            rows=Extent(4, c.stft_per_frame, extra=True), hop=c.hop, past=3, into=into,
        )  # fmt: skip
        done = begin * c.stft_per_frame + (not first)
        holds(into, 0, 3, n, F.pad(expected[done : done + n], (0, 14)))
        begin, tail = begin + count, into.tail_out


@pytest.mark.parametrize("final", [True, False])
def test_overlap_add_equals_an_inverse_stft(final):
    """Two chunks: the second has the three last frames of the first in front of it, and nothing else."""
    c, rate = SMALL, SMALL.stft_per_frame
    weights = pack(random_vocoder(SMALL), torch.float32)
    x = torch.randn(7 * rate + 1, 2 * weights.inverse.bins)
    magnitude, angle = x[:, :9].exp(), x[:, 9:].sin()
    expected = torch.istft(torch.polar(magnitude, angle).T, c.n_fft, c.hop, window=hann(c.n_fft, x))
    expected = F.pad(expected, (8, 0)).view(-1, c.hop).clamp(-0.4, 0.4)
    done, tail = 0, torch.full((3 * 32,), NAN)
    for frames in (3, 4):
        n, last = frames * rate + (done == 0), frames == 4 and final
        data = torch.full((1, MARGIN + 4 * rate + 1, 32), NAN)
        data[0, MARGIN - 3 : MARGIN] = tail.view(3, 32)
        data[0, MARGIN : MARGIN + n, :18] = x[done : done + n]
        out = torch.full((4 * rate + 2, c.hop), NAN)
        overlap_add(
            Rows(data, tail, tail), weights.inverse, counts(frames, first=done == 0, final=last),
            rows=Extent(4, rate, extra=True), limit=0.4, most=1e2, out=out,
        )  # fmt: skip
        skipped = 2 if done == 0 else 0
        assert relative(out[skipped : n + last], expected[done + skipped : done + n + last]) < 1e-5
        assert out[n + last :].isnan().all()
        done, tail = done + n, data[0, MARGIN + n - 3 : MARGIN + n].flatten()


def test_what_is_not_a_number_is_heard_of():
    """A float16 that overflowed must not come out as a number."""
    weights = pack(random_vocoder(SMALL), torch.float32)
    data = torch.zeros(1, MARGIN + 13, 32)
    data[0, MARGIN + 5, 3] = NAN
    out = torch.zeros(14, SMALL.hop)
    overlap_add(
        Rows(data, data, data), weights.inverse, counts(2), rows=Extent(2, 6, extra=True), limit=1.0, most=1e2, out=out
    )
    assert out.isnan().any(1).nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_are_not_finite_are_noted(dtype):
    weight, flag = torch.full((3, 37, 64), 60000.0, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    for value in (60000.0, -math.inf, math.inf, math.nan):
        weight[-1, -1, -1] = value
        flag.zero_()
        note_infinite(weight, flag)
        assert flag.item() == (not math.isfinite(value))
    note_infinite(torch.ones_like(weight), flag)
    assert flag.item() == 1
