"""cosyq tune as a user meets it: what is measured is what is written, once; what comes out is within the budget."""

import json

import pytest
import torch
from conftest import GOLDEN, refused

from cosyq.artifact.reader import open_artifact
from cosyq.eval.distances import DECIBELS
from cosyq.eval.stages import Arithmetic, compare, mels
from cosyq.quantize.formats import Format, four_bit
from cosyq.recipe import load_recipe
from cosyq.runtime.request import Requests
from cosyq.sequences import Spoken, shown
from cosyq.tune import measure
from cosyq.tune.kept import Costs
from cosyq.tune.probe import Probe, open_probe
from cosyq.tune.sentences import sentences

CPU = Arithmetic(torch.device("cpu"))
IDS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4)
# Few units, so that it takes seconds: of the flow two, of the language model's first layer all.
FEW = 'rules=[{match: "re:flow.*blocks.[0-9].(attn|ff.up).*|llm.(head|.*embedding|layers.[^0].*)", weights: int8}]'
TINY = ("int8", "--source", GOLDEN, "--set", "voices=[]", "--set", FEW, "--sequences", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """The user's cache, and a folder to be in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "cosyq" / "tune"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """What was said, of ids drawn evenly: by itself the golden checkpoint speaks without end."""

    def listen(artifact, reference, texts, voices, **others):
        random, vocabulary = torch.Generator().manual_seed(0), artifact.manifest.model.llm.speech_vocab
        spoken = [
            Spoken("hello", voices[0].name, 0, tuple(torch.randint(vocabulary, (20,), generator=random).tolist()), end)
            for end in ("stop", "length")
        ]
        return shown(Requests(artifact), spoken, voices)

    monkeypatch.setattr(measure, "listen", listen)


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the networks, in order."""
    questions, cost = [], Probe.cost

    def counted(self, stored):
        questions.append(dict(stored))
        return cost(self, stored)

    monkeypatch.setattr(Probe, "cost", counted)
    return questions


def tuned(cli, *arguments):
    code, out, err = cli("tune", *TINY, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def dry_run(cli, recipe):
    code, out, err = cli("quantize", recipe, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)


# ---- what is measured


@pytest.mark.parametrize(("module", "fmt"), [("llm.head", four_bit("nf4")), ("llm.text_embedding", Format("int8"))])
def test_the_cost_is_that_of_the_artifact(artifact_of, voice, module, fmt):
    reference = open_artifact(artifact_of("fp32"))
    other = open_artifact(artifact_of("fp32", f"rules=[{{match: {module}, weights: {fmt.name}}}]"))
    spoken = [Spoken("hello world", voice.name, 0, IDS, "stop")]
    heard = shown(Requests(reference), spoken, [voice])
    series, _ = compare(other, reference, heard, CPU, lambda *_: None)
    (expected,) = (s.artifact.sum() / s.artifact_weights.sum() for s in series if s.metric.key == "llm.kl")
    probe = open_probe("llm", reference, heard, CPU)
    assert probe.cost({module: fmt}) == pytest.approx(expected, rel=1e-3)
    assert probe.cost({}) == 0


def test_the_cost_of_the_flow_is_the_squared_distance(artifact_of, voice):
    module = "flow.estimator.blocks.0.ff.down"
    reference = open_artifact(artifact_of("fp32"))
    other = open_artifact(artifact_of("fp32", f"rules=[{{match: {module}, weights: int8}}]"))
    heard = shown(Requests(reference), [Spoken("hello", voice.name, 0, IDS, "stop")], [voice])
    (mine,), (right,) = (list(mels(CPU.load(side, "flow"), heard)) for side in (other, reference))
    expected = ((mine - right) * DECIBELS).square().mean().item()
    probe = open_probe("flow", reference, heard, CPU)
    assert probe.cost({module: Format("int8")}) == pytest.approx(expected, rel=1e-3)
    assert probe.cost({}) == 0


def test_tuned_on_other_sentences_than_evaluated():
    from cosyq.eval import sentences as evaluated

    ours = sentences(32, bundled=False)
    assert len(set(ours)) == len(ours) == 32
    assert not set(ours) & {*evaluated.sentences("en"), *evaluated.sentences("zh")}
    assert sentences(3, bundled=True) == ours[0:6:2]


# ---- what comes out


def test_a_recipe_within_the_budget_and_why(cli, asked, kept, tmp_path):
    report = tuned(cli, "--budget", "4.48MB", "-o", "small.yaml")
    assert report["bytes"] <= report["limit_bytes"] == 4_480_000
    assert len(asked) == len({str(question) for question in asked}) == sum(len(m["choices"]) for m in report["modules"])
    plan = dry_run(cli, "small.yaml")
    assert plan["bytes"] == report["bytes"]
    formats = {row["module"]: row["format"] for row in plan["modules"]}
    for row in report["modules"]:
        assert {formats[module] for module in row["modules"]} == {row["format"]}
        assert all(choice["cost"] >= 0 for choice in row["choices"].values())
    assert formats["llm.head"] == "int8"  # as the recipe's own rule has it
    assert json.loads((tmp_path / "small.json").read_text()) == {
        key: value for key, value in report.items() if key not in ("output", "sensitivities")
    }
    assert load_recipe(tmp_path / "small.yaml").name == "fun-cosyvoice3-0.5b-int8-tuned-4.48MB"
    (file,) = kept.iterdir()
    before = file.read_bytes(), (tmp_path / "small.yaml").read_bytes(), (tmp_path / "small.json").read_bytes()

    asked.clear()  # another budget: nothing is measured again, and more room loses less
    larger = tuned(cli, "--budget", "4.55MB", "-o", "large.yaml")
    assert report["bytes"] < larger["bytes"] <= 4_550_000
    for stage, found in report["predicted"].items():
        assert larger["predicted"][stage]["smallest"] == found["smallest"]
    assert loss(larger) < loss(report)
    assert not asked

    code, out, err = cli("tune", *TINY, "--budget", "1GB", "-o", "all.yaml")  # more than there is use for
    assert (code, out) == (0, "all.yaml\n")
    assert "best format" in err
    best = tuned(cli, "--budget", "16.1bpw", "-o", "bits.yaml")
    assert loss(best) <= loss(larger)
    assert 15 < best["bits_per_weight"] <= 16

    file.unlink()  # the same again, from nothing: the same bytes
    tuned(cli, "--budget", "4.48MB", "-o", "small.yaml", "--force")
    assert (file.read_bytes(), (tmp_path / "small.yaml").read_bytes(), (tmp_path / "small.json").read_bytes()) == before


def loss(report):
    return sum(found["loss"] / found["smallest"] for found in report["predicted"].values())


def test_an_interrupted_run_goes_on(cli, asked, monkeypatch):
    cost, left = Probe.cost, 5

    def interrupted(self, stored):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return cost(self, stored)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "cost", interrupted)
        refused(cli("tune", *TINY, "--budget", "4.48MB", "-o", "small.yaml"), 130, "interrupted")
    first = list(asked)
    report = tuned(cli, "--budget", "4.48MB", "-o", "small.yaml")
    assert len(first) == 5
    assert not [question for question in asked[5:] if question in first]
    assert len(asked) == sum(len(row["choices"]) for row in report["modules"])


def test_what_is_refused(cli, asked, tmp_path, kept):
    least = refused(cli("tune", *TINY, "--budget", "4MB"), 2, "--budget 4MB", "the least is").split()[-1]
    bits = refused(cli("tune", *TINY, "--budget", "2bpw"), 2, "the least is").split()[-1]
    refused(cli("tune", *TINY, "--budget", "lots"), 2, "--budget", "4.5bpw")
    refused(cli("tune", *TINY, "--budget", "5MB", "--formats", "int8,fp32"), 2, "--formats", "nf4")
    for weight in ("llm", "vocoder=1", "llm=-1", "llm=nan", "llm=0,flow=0"):
        refused(cli("tune", *TINY, "--budget", "5MB", "--weight", weight), 2, "--weight")
    refused(cli("tune", *TINY, "--budget", "5MB", "-o", tmp_path), 2, "no recipe can be written")
    (tmp_path / "there.json").write_text("{}")
    refused(cli("tune", *TINY, "--budget", "5MB", "-o", "there.yaml"), 2, "there.json", "--force")
    refused(cli("tune", "int8", "--source", tmp_path, "--set", "voices=[]", "--budget", "5MB"), 3)
    other = tmp_path / "other.json"
    other.write_text('{"origin": "another", "costs": {}}')
    refused(cli("tune", *TINY, "--budget", "5MB", "--measured", other), 3, "another model", "remove it")
    for damaged in ("{", '{"origin": 1}', '{"origin": "x", "costs": {"a": {"b": -1}}}', '{"origin": "x", "costs": []}'):
        other.write_text(damaged)
        with pytest.raises(Exception, match=r"not kept costs|measured of another"):
            Costs(other, "x")
    assert not asked
    assert {path.name for path in tmp_path.iterdir()} <= {"there.json", "other.json", "cache"}
    for budget in (least, bits):  # what it says is the least will do
        assert tuned(cli, "--budget", budget, "-o", "least.yaml", "--force")["bytes"] <= 4_460_000


def test_a_weight_that_a_format_cannot_hold(cli, artifact_of, voice):
    reference = open_artifact(artifact_of("fp32"))
    heard = shown(Requests(reference), [Spoken("hello", voice.name, 0, (3, 1, 4), "length")], [voice])
    probe = open_probe("llm", reference, heard, CPU)
    probe._weight("llm.head")[0, 0] = torch.inf
    with pytest.raises(Exception, match=r"llm\.head as nf4"):
        probe.cost({"llm.head": four_bit("nf4")})
