import hashlib
import re

import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from cosyq.errors import RecipeError
from cosyq.recipe import Recipe, find_recipe, load_recipe, parse_recipe, shipped_recipes

GOOD = """
version: 1
name: x
source: {path: somewhere}
stages: {llm: {weights: int8}, flow: {weights: bf16}}
"""


def parse(text, *overrides):
    return parse_recipe(text, "r.yaml", list(overrides))


@pytest.mark.parametrize("name", ["int8", "nf4", "hybrid", "bf16", "fp32", "mini", "mini-nf4"])
def test_shipped_recipes_are_valid(name):
    assert name in shipped_recipes()
    recipe = load_recipe(find_recipe(name))
    assert recipe.version == 1
    if not name.startswith("mini"):
        assert recipe.source.revision == "29e01c4e8d000f4bcd70751be16fa94bf3d85a18"
        assert set(recipe.source.sha256) == {
            "llm.pt",
            "flow.pt",
            "hift.pt",
            "campplus.onnx",
            "speech_tokenizer_v3.onnx",
        }
        (voice,) = recipe.voices
        assert voice.name == "default"
        assert re.fullmatch(
            r"https://raw\.githubusercontent\.com/FunAudioLLM/CosyVoice/[0-9a-f]{40}/asset/zero_shot_prompt\.wav",
            voice.audio,
        )
        audio = (GOLDEN.parent / "audio" / "zero_shot_prompt.wav").read_bytes()
        assert voice.sha256 == hashlib.sha256(audio).hexdigest()
        assert voice.transcript == "希望你以后能够做的比我还好呦。"
        assert load_recipe(find_recipe(name), ["voices=[]"]).voices == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("extra: 1", "extra: unknown key, valid here: version, name, source"),
        (
            "stages: {llm: {weights: int8, wieghts: x}, flow: {weights: int8}}",
            "stages.llm.wieghts: unknown key, valid here: weights, blocksize",
        ),
        ("stages: {llm: {weights: int4}, flow: {weights: int8}}", "stages.llm.weights.*'int8'.*found 'int4'"),
        ("stages: {llm: {weights: int8}, flow: {weights: int8, steps: '10'}}", "stages.flow.steps.*list"),
        ("stages: {llm: {weights: int8}, flow: {weights: int8, steps: [true]}}", "stages.flow.steps.0"),
        ("stages: {llm: {weights: int8}, flow: {weights: int8, steps: [0]}}", "greater than or equal to 1"),
        ("stages: {llm: {weights: int8}, flow: {weights: int8, steps: [10, 10]}}", "steps repeat"),
        (
            "stages: {llm: {weights: int8}, flow: {weights: int8}, vocoder: {weights: int8}}",
            "stages.vocoder.weights.*'bf16'",
        ),
        ("stages: {llm: {weights: int8, blocksize: 64}, flow: {weights: int8}}", "options of nf4 and fp4, not of int8"),
        ("stages: {llm: {weights: nf4, blocksize: 63}, flow: {weights: int8}}", "stages.llm.blocksize"),
        ("stages: {llm: {weights: int8}}", "stages.flow: missing"),
        ("version: 2", "version"),
        ("name: ../x", "name"),
        ("source: {repo: a/b}", "repo and revision belong together"),
        ("source: {repo: a/b, revision: main, path: c}", "one of repo"),
        ("source: {path: c, sha256: {llm.pt: abc}}", r"source.sha256.llm.pt"),
        ("rules: [{match: x}]", "rules.0.weights: missing"),
        ("voices: [{name: a, file: x}, {name: a, file: y}]", "two voices have the same name"),
        ("voices: [{name: ../a, file: x}]", r"voices\.0\.name"),
        ("voices: [{name: a}]", r"voices\.0: give one of file, a ready voice, audio, a recording, and bundled"),
        ("voices: [{name: a, file: x, audio: y, transcript: z}]", "give one of file"),
        ("voices: [{name: a, bundled: clara}]", "a bundled voice goes with a bundled source"),
        ("source: {path: x, bundled: mini}", "give one of repo"),
        ("source: {bundled: huge}", r"source\.bundled"),
        ("voices: [{name: a, audio: y}]", "audio and its transcript belong together"),
        ("voices: [{name: a, file: y, transcript: z}]", "audio and its transcript belong together"),
        ("voices: [{name: a, audio: 'https://x/y', transcript: z}]", "remote audio needs its sha256"),
        *(
            (f"voices: [{{name: a, audio: '{url}', transcript: z, sha256: {'a' * 64}}}]", "or an https:// address")
            for url in (
                "http://x/y",
                "hf://a/b@c/d",
                "file:///x",
                "https:///y",
                "https://me:secret@x/y",
                "https://x/a b",
                "https://x",
                "https://x/ü",
            )
        ),
        ("voices: [{name: a, audio: y, transcript: z, sha256: 12}]", r"voices\.0\.sha256"),
        (f"voices: [{{name: a, audio: y, transcript: {'z' * 5000}}}]", "at most 4096 characters"),
        (
            "voices: [{name: a, audoi: y}]",
            r"voices\.0\.audoi: unknown key, valid here: name, file, audio, bundled, transcript",
        ),
        ("gate: {llm.kl: {maximum: 1}}", r"gate\.llm\.kl\.maximum: unknown key, valid here: max, min, max_difference"),
        ("gate: {llm.kl: {}}", r"gate\.llm\.kl: give max, min or max_difference"),
        ("gate: {llm.kl: 0.05}", r"gate\.llm\.kl"),
        ("gate: {kl: {max: 1}}", r"gate\.kl\.\[key\]"),
        ("gate: {llm.kl: {max: .nan}}", r"gate\.llm\.kl\.max.*finite"),
        ("gate: {llm.kl: {max: true}}", r"gate\.llm\.kl\.max"),
        ("gate: {llm.kl: {max_difference: -1}}", r"gate\.llm\.kl\.max_difference"),
        ("evaluate: {sequences: 7}", r"evaluate\.sequences"),
        (
            "evaluate: {sentences: 9}",
            r"evaluate\.sentences: unknown key, valid here: sequences, language, recognizer, mos",
        ),
        ("evaluate: {recognizer: 'command:x'}", r"evaluate\.recognizer"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    key = change.partition(":")[0]
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(key)) + "\n" + change
    with pytest.raises(RecipeError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mapping"),
        ("[1]", "mapping"),
        ("a: [", "not YAML"),
        ("a: 1\na: 2", "key 'a' is there twice"),
        ("a: !!python/object/apply:os.system [echo]", "not YAML"),
        ("a: !new:x {}", "not YAML"),
        ("{" * 5000, "not YAML"),
        ("x" * (2 << 20), "too many for a recipe"),
    ],
)
def test_what_is_no_recipe(text, message):
    with pytest.raises(RecipeError, match=message):
        parse(text)


def test_overrides():
    recipe = parse(GOOD, "stages.llm.weights=nf4", "stages.llm.blocksize=128", "stages.flow.steps=[6, 10]", "name=y")
    assert (recipe.stages.llm.weights, recipe.stages.llm.blocksize) == ("nf4", 128)
    assert (recipe.stages.flow.steps, recipe.name) == ([6, 10], "y")
    for bad in ("name", "=1", "name.x=1", "stages.llm.nothing=1"):
        with pytest.raises(RecipeError):
            parse(GOOD, bad)


def test_the_digest_is_of_what_shapes_the_bytes():
    one = parse(GOOD)
    assert parse("# a comment\n" + GOOD, "output=elsewhere", "source.path=there").digest() == one.digest()
    assert parse(GOOD, "stages.llm.weights=nf4").digest() != one.digest()
    voice = f"voices=[{{name: a, audio: 'https://x/y', transcript: z, sha256: {'a' * 64}}}]"
    spoken = parse(GOOD, voice)
    assert spoken.digest() != one.digest()
    assert parse(GOOD, voice, "voices.0.audio=a/copy.wav").digest() == spoken.digest()
    for change in ("name=b", "transcript=y", f"sha256={'b' * 64}"):
        assert parse(GOOD, voice, f"voices.0.{change}").digest() != spoken.digest()


def test_an_unknown_recipe_lists_the_shipped():
    with pytest.raises(RecipeError, match="no such recipe; shipped are: bf16, fp32, hybrid, int8, mini, mini-nf4, nf4"):
        find_recipe("int9")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    )
)
def test_no_value_gets_past_the_schema_or_breaks_it(value):
    import yaml

    for key in ("stages", "rules", "source", "voices", "version"):
        try:
            recipe = parse(GOOD, f"{key}={yaml.safe_dump(value)}")
        except RecipeError:
            continue
        assert isinstance(recipe, Recipe)


def test_a_gate_changes_nothing_in_the_artifact():
    gated = parse(GOOD + "\ngate: {llm.kl: {max: 0.05, max_difference: 0.1}}\nevaluate: {sequences: 9}\n")
    assert gated.gate["llm.kl"].max == 0.05
    assert gated.resolved() == parse(GOOD).resolved()
    assert gated.digest() == parse(GOOD).digest()
