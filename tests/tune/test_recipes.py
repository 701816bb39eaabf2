"""What there is to choose from, and that a recipe says what was chosen."""

import random

import pytest
from conftest import GOLDEN

from cosyq import build
from cosyq.errors import RecipeError
from cosyq.model.inventory import STAGES, inventory
from cosyq.quantize.plan import make_plan
from cosyq.recipe import find_recipe, load_recipe, parse_recipe
from cosyq.tune.units import find_choices
from cosyq.tune.written import recipe_text, tuned_rules

THREE = ("int8", "nf4", "bf16")


def mini(*overrides):
    recipe = load_recipe(find_recipe("mini"), list(overrides))
    return recipe, modules_of(build.prepare(recipe, ""))


def modules_of(prepared):
    return [module for stage in STAGES for module in inventory(stage, prepared.checkpoint.config, steps=prepared.steps)]


def bytes_of(recipe):
    return build.prepare(load_recipe(find_recipe(recipe)), "").bytes


def with_formats(choices, name):
    """Bytes where every unit has that format, or its smallest."""
    picks = [next((c for c in unit.choices if c.format.name == name), unit.choices[0]) for unit in choices.units]
    return choices.fixed + sum(pick.bytes for pick in picks)


def test_units_are_what_a_recipe_may_decide():
    recipe, modules = mini()
    choices = find_choices(recipe, modules, THREE)
    by_name = {unit.name: [str(c.format) for c in unit.choices] for unit in choices.units}
    packed = ["nf4/64+dq", "int8", "bf16"]
    assert by_name["llm.layers.0.self_attn.q_proj+k_proj+v_proj"] == packed
    assert by_name["llm.layers.5.mlp.gate_proj+up_proj"] == packed
    assert by_name["llm.head"] == packed
    assert by_name["llm.text_embedding"] == by_name["llm.speech_embedding"] == ["int8", "bf16"]
    assert by_name["flow.estimator.blocks.6.attn.to_q+to_k+to_v"] == packed
    found = [module.name for unit in choices.units for module in unit.modules]
    assert found == [m.name for m in modules if m.stage != "vocoder" and m.kind in ("matrix", "embedding")]
    assert choices.weights == sum(
        m.parameters["weight"][0] * m.parameters["weight"][1] for m in modules if m.kind == "matrix"
    )


def test_their_bytes_are_those_of_the_shipped_recipes():
    recipe, modules = mini()
    choices = find_choices(recipe, modules, THREE)
    assert choices.smallest == with_formats(choices, "nf4") == bytes_of("mini-nf4")
    assert with_formats(choices, "int8") == bytes_of("mini")
    assert choices.largest == with_formats(choices, "bf16")
    assert choices.rest < choices.smallest - choices.weights / 2


def test_what_a_rule_decides_stays():
    rules = "rules=[{match: llm.head, weights: int8}, {match: 'flow.*', weights: bf16}, {match: 'llm.*.v_proj', weights: fp32}]"
    recipe, modules = mini(rules)
    choices = find_choices(recipe, modules, THREE)
    names = {unit.name for unit in choices.units}
    assert "llm.layers.0.self_attn.q_proj+k_proj" in names
    assert not [name for name in names if name.startswith(("flow", "llm.head"))]
    assert str(choices.untouched["llm.layers.3.self_attn.v_proj"]) == "fp32"
    with pytest.raises(RecipeError, match="nothing to choose"):
        find_choices(*mini("rules=[{match: '*', weights: bf16}]"), THREE)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rules=[{match: llm.head, weights: int8}, {match: 'flow.*', weights: bf16}]",),
        ("stages.llm={weights: nf4, blocksize: 128, double_quant: false}", "stages.flow.weights=bf16"),
        ("source={path: DIR}", "voices=[]", "gate={llm.kl: {max: 0.1}}", "output=null"),
    ],
)
@pytest.mark.parametrize("formats", [THREE, ("fp4", "bf16"), ("int8", "nf4", "fp4", "bf16")])
def test_the_recipe_says_what_was_chosen(overrides, formats):
    recipe, modules = mini(*[text.replace("DIR", str(GOLDEN)) for text in overrides])
    choices = find_choices(recipe, modules, formats)
    for seed in range(6):
        draw = random.Random(seed)
        weights = [draw.random() ** 3 for _ in range(4)]
        picks = [draw.choices(unit.choices, weights[: len(unit.choices)])[0] for unit in choices.units]
        chosen = {m.name: c.format for unit, c in zip(choices.units, picks, strict=True) for m in unit.modules}
        defaults, rules = tuned_rules(recipe, modules, choices.untouched | chosen)
        text = recipe_text(recipe, "chosen", ["A line."], defaults, rules, ["why"] * len(rules))
        written = parse_recipe(text, "test", [])
        plan = make_plan(written, modules)
        assert {d.module.name: d.format for d in plan if d.module.kind != "exact"} == choices.untouched | chosen
        assert sum(d.bytes for d in plan) == choices.fixed + sum(pick.bytes for pick in picks)
        same = ("version", "source", "voices", "gate", "evaluate")
        assert [getattr(written, key) for key in same] == [getattr(recipe, key) for key in same]
        assert written.rules[: len(recipe.rules)] == recipe.rules
        assert written.stages.vocoder == recipe.stages.vocoder
        assert written.stages.flow.steps == recipe.stages.flow.steps
        assert text.startswith("# A line.\nversion: 1\nname: chosen\n")
        assert text.count("  # why\n") == len(rules) < 40


def test_a_recipe_is_as_short_as_can_be():
    recipe, modules = mini()
    choices = find_choices(recipe, modules, THREE)

    def said(name, **others):
        wanted = choices.untouched | {
            m.name: next(
                (c.format for c in u.choices if c.format.name == others.get(u.name, name)), u.choices[0].format
            )
            for u in choices.units
            for m in u.modules
        }
        defaults, rules = tuned_rules(recipe, modules, wanted)
        return defaults, [(rule.rule["match"], rule.rule["weights"]) for rule in rules]

    assert said("nf4") == ({"llm": "nf4", "flow": "nf4"}, [])
    assert said("bf16") == ({"llm": "bf16", "flow": "bf16"}, [])
    others = {
        "llm.head": "int8",
        "llm.layers.1.mlp.gate_proj+up_proj": "bf16",
        "llm.layers.3.mlp.gate_proj+up_proj": "bf16",
        "flow.estimator.blocks.2.ff.down": "int8",
    }
    assert said("nf4", **others) == (
        {"llm": "nf4", "flow": "nf4"},
        [
            (r"re:llm\.layers\.(1|3)\.mlp\.(gate_proj|up_proj)", "bf16"),
            ("llm.head", "int8"),
            ("flow.estimator.blocks.2.ff.down", "int8"),
        ],
    )
