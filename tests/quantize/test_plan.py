import pytest
from conftest import GOLDEN

from cosyq.checkpoint.reader import open_checkpoint
from cosyq.errors import RecipeError
from cosyq.model.inventory import STAGES, inventory
from cosyq.quantize.plan import make_plan
from cosyq.recipe import find_recipe, load_recipe


@pytest.fixture(scope="module")
def modules():
    config = open_checkpoint(GOLDEN).config
    return [module for stage in STAGES for module in inventory(stage, config, steps=(10,))]


def plan(modules, recipe, *overrides):
    decisions = make_plan(load_recipe(find_recipe(recipe), list(overrides)), modules)
    assert [d.module for d in decisions] == modules
    return {d.module.name: d for d in decisions}


def test_defaults_of_a_packed_stage(modules):
    found = plan(modules, "int8")
    assert str(found["llm.layers.0.mlp.down_proj"].format) == "int8"
    assert str(found["llm.head"].format) == "int8"
    assert str(found["llm.text_embedding"].format) == "int8"
    assert str(found["flow.estimator.blocks.2.attn.to_q"].format) == "int8"
    assert str(found["flow.estimator.proj_out"].format) == "bf16"
    assert str(found["flow.estimator.conv_pos.conv1"].format) == "bf16"
    assert str(found["vocoder.conv_pre"].format) == "fp32"
    assert str(found["llm.norm"].format) == "fp32"
    assert found["llm.norm"].rule == "always exact"
    assert found["llm.head"].rule == "stages.llm"


def test_pitch_and_tables_are_exact_under_every_recipe(modules):
    for recipe in ("int8", "nf4", "bf16"):
        for name, decision in plan(modules, recipe).items():
            if name.startswith(("vocoder.f0_predictor", "flow.adaln")) or "norm" in name or "activations" in name:
                assert str(decision.format) == "fp32", name


def test_the_first_rule_that_matches_wins(modules):
    found = plan(
        modules,
        "int8",
        "rules=[{match: 'llm.layers.*.mlp.down_proj', weights: bf16},"
        " {match: 're:llm[.]layers[.][01][.]mlp[.].*', weights: nf4, double_quant: false}]",
    )
    assert str(found["llm.layers.0.mlp.down_proj"].format) == "bf16"
    assert found["llm.layers.0.mlp.down_proj"].rule == "rules[0] llm.layers.*.mlp.down_proj"
    assert str(found["llm.layers.1.mlp.up_proj"].format) == "nf4/64"
    assert str(found["llm.layers.2.mlp.up_proj"].format) == "int8"


def test_a_block_divides_its_row(modules):
    """The golden checkpoint's MLP is 160 wide: 64 does not divide it, 32 does."""
    found = plan(modules, "nf4")
    assert str(found["llm.layers.0.mlp.up_proj"].format) == "nf4/64+dq"
    assert str(found["llm.layers.0.mlp.down_proj"].format) == "nf4/32+dq"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{match: 'llm.layer.*', weights: bf16}", r"rules\[0\] 'llm.layer.\*': matches no module"),
        ("{match: 'llm.norm', weights: bf16}", "matches no module that is still undecided"),
        ("{match: 're:llm.(', weights: bf16}", "not a regular expression"),
        ("{match: 'vocoder.*', weights: int8}", "is a convolution and cannot be int8; use bf16, fp16 or fp32"),
        ("{match: 'llm.*_embedding', weights: nf4}", "is an embedding and cannot be nf4; use int8"),
        ("{match: 'flow.token_embedding', weights: fp4}", "is an embedding and cannot be fp4"),
    ],
)
def test_rules_that_cannot_be(modules, rule, message):
    with pytest.raises(RecipeError, match=message):
        plan(modules, "int8", f"rules=[{rule}]")


def test_a_rule_in_the_shadow_of_another_is_an_error(modules):
    with pytest.raises(RecipeError, match=r"rules\[1\]"):
        plan(modules, "int8", "rules=[{match: 'llm.*_proj', weights: bf16}, {match: 'llm.*.k_proj', weights: nf4}]")
