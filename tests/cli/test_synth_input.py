"""The ways text comes to `cosyq synth`: files, JSON lines, stdin as it arrives; and subtitles of what was said."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from test_cli import COSYQ, as_on_a_terminal, refused

from cosyq.cli import batch
from cosyq.cli.main import run

TEXT = "hello world, the quick brown fox jumps over the lazy dog"


@pytest.fixture
def cli(capfd, tmp_path):
    """Run a command line in this process, with stdin; returns (exit code, stdout, stderr)."""

    def call(*arguments, stdin=b""):
        source = tmp_path / ".stdin"
        source.write_bytes(stdin)
        with source.open() as file:
            before, sys.stdin = sys.stdin, file
            try:
                code = run([str(a) for a in arguments])
            finally:
                sys.stdin = before
                source.unlink()
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def spoken(artifact_of):
    return ("-a", artifact_of("int8"), "--device", "cpu")


def samples(path):
    return soundfile.read(path, dtype="int16")[0]


# ---- files and subtitles


def test_a_file_is_as_good_as_an_argument(cli, spoken, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    for name, source in (("a", [TEXT]), ("b", ["--file", tmp_path / "text.txt"])):
        assert cli("synth", *source, *spoken, "--seed", 3, "-o", tmp_path / f"{name}.wav")[0] == 0
    assert np.array_equal(samples(tmp_path / "a.wav"), samples(tmp_path / "b.wav"))
    out = ("-o", tmp_path / "c.wav")
    refused(cli("synth", *spoken, *out), 2, "give a text")
    refused(cli("synth", "x", "--file", tmp_path / "text.txt", *spoken, *out), 2, "one of them")
    refused(cli("synth", "--file", tmp_path / "none", *spoken, *out), 2, "none", "cannot be read")
    (tmp_path / "text.txt").write_bytes(b"\xff")
    refused(cli("synth", "--file", tmp_path / "text.txt", *spoken, *out), 2, "text.txt", "not valid UTF-8")
    (tmp_path / "text.txt").write_bytes(b"a" * ((1 << 20) + 1))
    refused(cli("synth", "--file", tmp_path / "text.txt", *spoken, *out), 2, "more than 1048576 bytes")


def cues(path):
    found = re.findall(r"(\d+)\n(\S+) --> (\S+)\n(.*)\n", path.read_text("utf-8"))
    assert [int(number) for number, *_ in found] == list(range(1, len(found) + 1))

    def seconds(time):
        h, m, s, ms = map(int, re.split("[:,]", time))
        return h * 3600 + m * 60 + s + ms / 1000

    return [(seconds(begin), seconds(end), text) for _, begin, end, text in found]


LONG = "hello world. the fox.\n\nthe dog."


@pytest.mark.parametrize(
    ("how", "stdin"),
    [([], False), (["--speed", "1.7"], False), (["--stream"], False), (["--stream", "--speed", "1.2"], True)],
)
def test_subtitles_have_the_times_of_the_audio(cli, spoken, tmp_path, how, stdin):
    wav, srt = tmp_path / "x.wav", tmp_path / "x.srt"
    source = {"stdin": LONG.encode()} if stdin else {}
    command = ("synth", "-" if stdin else LONG, *spoken, "--seed", 3, *how, "-o", wav, "--srt", srt)
    assert cli(*command, **source)[0] == 0
    found, audio = cues(srt), samples(wav)
    assert len(found) > 1
    assert " ".join(text for *_, text in found) == " ".join(LONG.split())
    assert found[0][0] == 0
    assert found[-1][1] == pytest.approx(len(audio) / 24000, abs=0.002)
    for (_, end, _), (begin, _, _) in pairwise(found):
        assert begin - end == pytest.approx(0 if begin < found[-1][0] else 0.4, abs=0.002)
    silence = audio[round((found[-2][1] + 0.002) * 24000) : round((found[-1][0] - 0.002) * 24000)]
    assert len(silence) > 9000
    assert not silence.any()


def test_subtitles_are_checked_first_and_appear_whole(cli, spoken, tmp_path):
    out = ("-o", tmp_path / "x.wav", "--srt")
    refused(cli("synth", "hello", *spoken, *out, tmp_path / "x.txt"), 2, ".srt")
    refused(cli("synth", "hello", *spoken, *out, tmp_path / "no" / "x.srt"), 2, "no such folder")
    (tmp_path / "x.srt").mkdir()
    refused(cli("synth", "hello", *spoken, *out, tmp_path / "x.srt"), 3, "cannot be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.srt", "x.wav"]


# ---- JSON lines


def lines(*items):
    return "\n".join(item if isinstance(item, str) else json.dumps(item) for item in items).encode()


def results(out):
    return [json.loads(line) for line in out.splitlines()]


def test_each_line_is_a_file_and_a_result(cli, spoken, tmp_path, voice):
    (tmp_path / "me.safetensors").write_bytes(voice.to_bytes())
    text = lines(
        {"id": "a", "text": "hello world"},
        "",
        {"id": "b", "text": "hello world", "out": "sub/b.flac", "seed": 4, "speed": 2},
        {"id": "c", "text": "hello world", "voice": str(tmp_path / "me.safetensors"), "instruct": "slowly"},
    )
    code, out, err = cli("synth", "-", "--jsonl", *spoken, "--seed", 3, "-o", tmp_path / "out", stdin=text)
    assert code == 0, err
    a, b, c = results(out)
    assert [(r["line"], r["id"], r["ok"], r["skipped"], r["seed"]) for r in (a, b, c)] == [
        (1, "a", True, False, 3), (3, "b", True, False, 4), (4, "c", True, False, 3)
    ]  # fmt: skip
    assert a["out"] == str(tmp_path / "out" / "a.wav")
    assert {"total_seconds", "audio_seconds", "real_time_factor", "finish"} <= a.keys()
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == ["a.wav", "a.wav.json", "c.wav", "c.wav.json", "sub/b.flac", "sub/b.flac.json"]
    assert "3 spoken, 0 skipped, 0 failed" in err
    # The same as one at a time.
    assert cli("synth", "hello world", *spoken, "--seed", 3, "-o", tmp_path / "a.wav")[0] == 0
    assert np.array_equal(samples(tmp_path / "a.wav"), samples(a["out"]))
    assert cli("synth", "hello world", *spoken, "--seed", 4, "--speed", 2, "-o", tmp_path / "b.flac")[0] == 0
    assert np.array_equal(samples(tmp_path / "b.flac"), samples(b["out"]))
    command = ("-v", tmp_path / "me.safetensors", "--instruct", "slowly", "--seed", 3, "-o", tmp_path / "c.wav")
    assert cli("synth", "hello world", *spoken, *command)[0] == 0
    assert np.array_equal(samples(tmp_path / "c.wav"), samples(c["out"]))


BAD = [
    ("not json", "not JSON"),
    ("[1]", "is a JSON object"),
    ("[" * 100_000, "not JSON"),
    ('{"id": "x", "id": "x", "text": "hello"}', "a key is there twice"),
    ({"id": "x"}, "text: missing"),
    ({"id": "x", "text": "hello", "txet": 1}, "txet: unknown key, valid here: id, text, voice"),
    ({"id": "x", "text": 7}, "text: Input should be a valid string, found 7"),
    ({"id": "x", "text": "hello", "seed": "7"}, "seed: Input should be a valid integer"),
    ({"id": "x1", "text": "hello", "seed": -7}, "a seed is a number from 0"),
    ({"id": "x2", "text": "hello", "speed": 9}, "a speed is a number from 0.5"),
    ('{"id": "x3", "text": "hello", "speed": NaN}', "a speed is a number"),
    ({"id": "../x", "text": "hello"}, "id: String should match"),
    ({"id": ".x", "text": "hello"}, "id: String should match"),
    ({"id": "x" * 200, "text": "hello"}, "id: String should match"),
    *(
        ({"id": "x", "text": "hello", "out": out}, "out: a path of plain names")
        for out in ("../x.wav", "/tmp/x.wav", "a/../../x.wav", "x", "x.aiff", ".x.wav", "a//x.wav", "x.wav\n", "a\\x.wav", "é.wav")
    ),
    ({"id": "x4", "text": "..."}, "nothing to say"),
    ({"id": "x5", "text": "a" * 60_000}, "60000 characters are too many"),
    ({"id": "x6", "text": "a\ud800"}, "not valid UTF-8"),
    ({"id": "x7", "text": "hello", "voice": "nobody"}, "unknown voice"),
    ({"id": "x", "text": "hello", "voice": "nobody\ud800"}, "voice: Input should be a valid string"),
    ({"id": "x", "text": "x" * (1 << 20)}, "more than 1048576 bytes"),
    ({"id": "good", "text": "hello"}, "another line has the same id"),
    ({"id": "x", "text": "hello", "out": "good.wav"}, "another line has the same id"),
]  # fmt: skip


def test_a_line_that_fails_is_told_and_stops_nothing(cli, spoken, tmp_path):
    items = [{"id": "good", "text": "hello"}, *(bad for bad, _ in BAD), {"id": "last", "text": "hello"}]
    (tmp_path / "lines").write_bytes(lines(*items))
    result = cli("synth", "--file", tmp_path / "lines", "--jsonl", *spoken, "--seed", 1, "-o", tmp_path / "out")
    refused(result, 2, f"{len(BAD)} of {len(BAD) + 2} lines failed")
    first, *failed, last = results(result[1])
    assert first["ok"]
    assert last["ok"]
    assert last["line"] == len(BAD) + 2
    for number, (found, (_, message)) in enumerate(zip(failed, BAD, strict=True), 2):
        assert (found["line"], found["ok"]) == (number, False)
        assert found["error"]["kind"] == "UsageError"
        assert found["error"]["exit_code"] == 2
        assert message in found["error"]["message"]
        assert len(json.dumps(found)) < 2000
    made = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(map(str, made)) == ["lines", "out/good.wav", "out/good.wav.json", "out/last.wav", "out/last.wav.json"]


def test_a_link_does_not_lead_out(cli, spoken, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "away").symlink_to(tmp_path)
    text = lines({"id": "x", "text": "hello", "out": "away/x.wav"})
    result = cli("synth", "-", "--jsonl", *spoken, "-o", tmp_path / "out", stdin=text)
    refused(result, 2, "1 of 1")
    assert "leads out" in results(result[1])[0]["error"]["message"]
    assert not (tmp_path / "x.wav").exists()


def test_a_second_run_goes_on_where_the_first_stopped(cli, spoken, tmp_path):
    command = ("synth", "-", "--jsonl", *spoken, "-o", tmp_path / "out")
    a, b = {"id": "a", "text": "hi"}, {"id": "b", "text": "hi"}

    def skipped(*items, options=()):
        code, out, _ = cli(*command, *options, stdin=lines(*items))
        return code, [r.get("skipped") for r in results(out)], results(out)

    assert skipped(a)[:2] == (0, [False])
    made = (tmp_path / "out" / "a.wav").read_bytes()
    assert skipped(a, b)[:2] == (0, [True, False])
    assert (tmp_path / "out" / "a.wav").read_bytes() == made
    # Any difference in what it is made from is seen, and nothing is overwritten unasked.
    for other, options in (
        (a | {"text": "ho"}, ()), (a | {"seed": 5}, ()), (a | {"speed": 1.1}, ()), (a, ("--cross-lingual",)),
        (a | {"instruct": "slowly"}, ()),
    ):  # fmt: skip
        code, _, (result,) = skipped(other, options=options)
        assert code == 2
        assert "is there already, and not of this line; use --force" in result["error"]["message"]
    assert (tmp_path / "out" / "a.wav").read_bytes() == made
    assert skipped(a | {"seed": 5}, options=["--force"])[:2] == (0, [False])
    assert skipped(a | {"seed": 5})[:2] == (0, [True])
    # A file whose origin is not known is not taken for ours; a record without its file is no obstacle.
    for record in (b"", b"[" * 100_000, b"[]", b"{}", b"\xff"):
        (tmp_path / "out" / "b.wav.json").write_bytes(record)
        assert skipped(b)[0] == 2
    (tmp_path / "out" / "b.wav").unlink()
    assert skipped(b)[:2] == (0, [False])


def test_the_voice_counts_and_not_its_name(cli, spoken, tmp_path, voice):
    import dataclasses

    path = tmp_path / "me.safetensors"
    item = {"id": "a", "text": "hello", "voice": str(path)}
    codes = []
    for transcript in ("hello there", "hello there", "hello you"):
        path.write_bytes(dataclasses.replace(voice, transcript=transcript).to_bytes())
        codes.append(cli("synth", "-", "--jsonl", *spoken, "-o", tmp_path / "out", stdin=lines(item))[0])
    assert codes == [0, 0, 2]


def test_a_failure_leaves_no_record(cli, spoken, tmp_path, monkeypatch):
    """A bug, and memory that runs out: told with their kinds; the next run makes the file."""
    import torch

    def fails(error):
        def mel(*_, **__):
            raise error

        return mel

    command = ("synth", "-", "--jsonl", *spoken, "-o", tmp_path / "out")
    text = lines({"id": "a", "text": "hello"}, {"id": "b", "text": "hello"})
    for error, code, kind in (
        (ZeroDivisionError(), 1, "CosyqError"),
        (torch.OutOfMemoryError("7 EiB"), 4, "DeviceError"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("cosyq.runtime.engine.TorchEngine.mels", fails(error))
            result = cli(*command, "--force", stdin=text)
        refused(result, code, "2 of 2 lines failed")
        assert [(r["error"]["kind"], r["error"]["exit_code"]) for r in results(result[1])] == [(kind, code)] * 2
    assert list((tmp_path / "out").iterdir()) == []
    assert cli(*command, stdin=text)[0] == 0
    # An overwriting run that fails leaves the old file, which no record claims any more.
    with monkeypatch.context() as patch:
        patch.setattr("cosyq.runtime.engine.TorchEngine.mels", fails(ZeroDivisionError()))
        cli(*command, "--force", "--seed", 9, stdin=text)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.wav", "b.wav"]


def test_jsonl_refuses(cli, spoken, tmp_path):
    out = ("-o", tmp_path / "out")
    for others in (["--stream"], ["--raw"], ["--json"], ["--srt", tmp_path / "x.srt"]):
        refused(cli("synth", "-", "--jsonl", *spoken, *out, *others), 2, "--jsonl", others[0])
    refused(cli("synth", "hello", "--jsonl", *spoken, *out), 2, "a TEXT")
    refused(cli("synth", "-", "--jsonl", *spoken), 2, "use -o FOLDER")
    (tmp_path / "out").write_text("")
    refused(cli("synth", "-", "--jsonl", *spoken, *out), 2, "not a folder")


def test_memory_is_bounded_by_the_longest_line(monkeypatch):
    """A line without an end is read in parts that are dropped."""
    sizes = []

    class Endless:
        left = 50

        def readline(self, limit):
            sizes.append(limit)
            self.left -= 1
            return b"x" * limit if self.left > 0 else b""

    assert [(number, line) for number, line, _ in batch._numbered(Endless())] == [(1, None)]
    assert max(sizes) <= batch.MAX_LINE + 1


def test_ctrl_c_keeps_what_is_done(spoken, tmp_path):
    items = [{"id": f"n{i}", "text": TEXT} for i in range(200)]
    (tmp_path / "lines").write_bytes(lines(*items))
    command = [*COSYQ, "synth", "--file", tmp_path / "lines", "--jsonl", *spoken, "--seed", "3", "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        preexec_fn=as_on_a_terminal,
    )
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert len(list((tmp_path / "out").iterdir())) < 16  # told as they are made
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert err.decode().strip().splitlines()[-1] == "error: interrupted"
    told += results(out.decode())
    assert 2 <= len(told) < 200
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {f"{r['id']}.wav{end}" for r in told for end in ("", ".json")}


def test_a_reader_of_the_results_that_leaves_ends_the_work(spoken, tmp_path):
    (tmp_path / "lines").write_bytes(lines(*({"id": f"n{i}", "text": "hello"} for i in range(300))))
    command = [*COSYQ, "synth", "--file", tmp_path / "lines", "--jsonl", *spoken, "-o", tmp_path / "out"]
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(180) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert len(list((tmp_path / "out").iterdir())) < 300


def test_on_a_terminal_the_results_still_go_to_stdout(spoken, tmp_path):
    """With a bar on stderr."""
    (tmp_path / "lines").write_bytes(lines({"id": "a", "text": "hello"}))
    command = [*COSYQ, "synth", "--file", tmp_path / "lines", "--jsonl", *spoken, "-o", tmp_path / "out"]
    master, slave = pty.openpty()
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    out = process.communicate(timeout=180)[0]
    shown = os.read(master, 1 << 16)
    os.close(master)
    assert results(out.decode())[0]["ok"]
    assert b"speaking" in shown
    assert b'"ok"' not in shown


# ---- stdin as it arrives


def speaking(spoken, *arguments):
    command = [*COSYQ, "synth", "-", "--stream", *spoken, "--seed", "3", *arguments]
    return subprocess.Popen(
        [str(c) for c in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=as_on_a_terminal,
    )


def test_it_speaks_while_the_writer_still_writes(spoken):
    process = speaking(spoken, "--raw")
    process.stdin.write(b"hello world, the quick brown fox jumps ")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], 180)[0], "no audio before the end of the text"
    begin = os.read(process.stdout.fileno(), 1 << 20)
    assert begin
    process.stdin.write(b"over the lazy dog")  # and no line end
    rest, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert begin + rest == speaking(spoken, "--raw").communicate(TEXT.encode(), timeout=180)[0]


def test_characters_may_come_in_halves(spoken):
    """Bytes, one by one."""
    process = speaking(spoken, "--raw")
    for byte in "héllo 你好, the fox".encode():
        process.stdin.write(bytes([byte]))
        process.stdin.flush()
        time.sleep(0.002)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert len(out) > 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "nothing to say"),
        (b" ...\n", "nothing to say"),
        ("hello 你".encode()[:-1], "stdin: not valid UTF-8"),
        (b"hello \xff there", "stdin: not valid UTF-8"),
        (b"slowly<|endofprompt|>hello ", "placed for you"),
    ],
)
def test_a_text_that_turns_out_unusable(cli, spoken, tmp_path, text, message):
    for output in (["-o", tmp_path / "x.wav"], ["-o", "-"]):
        result = cli("synth", "-", "--stream", *spoken, *output, stdin=text)
        refused(result, 2, message)
        assert result[1] == ""
    assert list(tmp_path.iterdir()) == []


def test_too_much_text_is_refused_when_it_has_come(cli, spoken, tmp_path, monkeypatch):
    monkeypatch.setattr("cosyq.text.arriving.MAX_CHARACTERS", 100)
    refused(cli("synth", "-", "--stream", *spoken, "-o", tmp_path / "x.wav", stdin=b"hello " * 20), 2, "too many")


def test_ctrl_c_while_it_waits_for_text(spoken, tmp_path):
    process = speaking(spoken, "-o", tmp_path / "x.wav")
    process.stdin.write(b"hello world, the quick brown fox jumps ")
    process.stdin.flush()
    deadline = time.monotonic() + 180
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    err = process.stderr.read().decode()
    assert process.wait(180) == 130
    assert err.strip().splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_a_listener_that_leaves_ends_it(spoken):
    process = speaking(spoken, "--raw")
    process.stdout.close()
    process.stdin.write(f"{TEXT} ".encode() * 3)
    process.stdin.close()
    assert process.wait(180) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
