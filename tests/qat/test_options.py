"""The table of options: its names, one rule of precedence, and both spellings on the command line."""

import re

import click
import pytest
from click.testing import CliRunner

from mlxquant.errors import RecipeError
from mlxquant.qat.options import EMBEDDINGS, OPTIONS, POINTS, PROJECTIONS, QuantizationOptions
from mlxquant.train_gpt import command

NAMES = [
    "quantize_linear_method", "activations_quant_method", "quantization_warmup_iters", "store_activations",
    "linear_variant_attn", "linear_variant_q", "linear_variant_k", "linear_variant_v", "linear_variant_attn_proj",
    "linear_variant_mlp", "linear_variant_mlp_up", "linear_variant_mlp_down",
    "quantize_attn_act", "quantize_attn_act_input", "quantize_attn_act_qk_mult_q_input",
    "quantize_attn_act_qk_mult_k_input",
    "quantize_attn_act_softmax_input", "quantize_attn_act_pv_mult_p_input", "quantize_attn_act_pv_mult_v_input",
    "quantize_attn_act_pv_mult_output", "quantize_attn_act_output",
    "quantize_attn_act_bits", "quantize_attn_act_input_bits", "quantize_attn_act_qk_mult_q_input_bits",
    "quantize_attn_act_qk_mult_k_input_bits", "quantize_attn_act_softmax_input_bits",
    "quantize_attn_act_pv_mult_p_input_bits",
    "quantize_attn_act_pv_mult_v_input_bits", "quantize_attn_act_pv_mult_output_bits", "quantize_attn_act_output_bits",
    "quantize_mlp_act", "quantize_mlp_act_input", "quantize_mlp_act_activation_input",
    "quantize_mlp_act_activation_output",
    "quantize_mlp_act_output",
    "quantize_mlp_act_bits", "quantize_mlp_act_input_bits", "quantize_mlp_act_activation_input_bits",
    "quantize_mlp_act_activation_output_bits", "quantize_mlp_act_output_bits",
]  # fmt: skip
SAMPLES = {"flag": True, "bits": 3, "count": 7}
OTHERS = {"flag": False, "bits": 5, "count": 9}


def values(option):
    """Two values that an option can have."""
    if option.kind == "choice":
        return option.choices[-1], option.choices[0]
    return SAMPLES[option.kind], OTHERS[option.kind]


def parse(*arguments):
    """What a command line gives to the options, by name."""
    given = command.make_context("train-gpt", list(arguments)).params
    return QuantizationOptions({name: value for name, value in given.items() if name in OPTIONS and value is not None})


def spelled(option, value, dashes):
    name = option.name.replace("_", "-") if dashes else option.name
    if option.kind == "flag":
        return [f"--{'' if value else 'no-' if dashes else 'no_'}{name}"]
    return [f"--{name}={value}"]


def with_company(name, value):
    """An option, and the one that it does not go without."""
    if name == "full_quant_iteration":
        return {name: value + 100, "quantization_level_schedule": "linear"}
    return {
        name: value,
        **({"full_quant_iteration": 200} if (name, value) == ("quantization_level_schedule", "linear") else {}),
    }


def test_every_option_is_there_under_its_name():
    assert set(NAMES) <= set(OPTIONS)
    assert len(OPTIONS) == 62


@pytest.mark.parametrize("dashes", [True, False], ids=["dashes", "underscores"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_parses_in_both_spellings(name, dashes):
    for value in values(OPTIONS[name]):
        wanted = with_company(name, value)
        options = parse(*(word for key, own in wanted.items() for word in spelled(OPTIONS[key], own, dashes)))
        assert options.given == wanted
        assert options[name] == wanted[name]


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.follows])
def test_what_is_given_counts_more_than_what_it_follows(name):
    option = OPTIONS[name]
    default = QuantizationOptions()[option.follows]
    assert QuantizationOptions()[name] == default
    one, other = values(option)
    assert QuantizationOptions({option.follows: one})[name] == one
    assert QuantizationOptions({option.follows: one, name: other})[name] == other
    assert QuantizationOptions({option.follows: other, name: one})[name] == one
    siblings = [sibling for sibling, o in OPTIONS.items() if o.follows == option.follows and sibling != name]
    assert all(QuantizationOptions({option.follows: one, name: other})[sibling] == one for sibling in siblings)


def test_an_explicit_no_overrides_a_global_yes():
    options = parse(
        "--quantize_attn_act",
        "--no-quantize_attn_act_input",
        "--linear_variant_attn=quantized_linear",
        "--linear_variant_k=linear",
    )
    assert options.activation("attn", "input") is None
    assert all(options.activation("attn", point) for point in POINTS["attn"] if point != "input")
    assert [name for name in PROJECTIONS if options.projection(name)] == ["q", "v", "attn_proj"]


def test_nothing_is_quantized_by_default():
    options = QuantizationOptions()
    assert not options.anything
    assert options["quantization_warmup_iters"] == 100
    for group, points in POINTS.items():
        assert options[f"quantize_{group}_act"] is False
        assert options[f"linear_variant_{group}"] == "linear"
        assert {options[f"quantize_{group}_act_{point}_bits"] for point in points} == {8}
    assert options["store_activations"] is False


@pytest.mark.parametrize(
    "name", [*(f"quantize_{group}_act" for group in POINTS), *(f"quantize_{name}" for name in EMBEDDINGS)]
)
def test_anything_says_whether_something_is_quantized(name):
    assert QuantizationOptions({name: True}).anything


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize_attn_act_inputs": True}, "unknown quantization option 'quantize_attn_act_inputs'"),
        ({"quantize_linear_bits": 9}, "2 to 8, found 9"),
        ({"quantize_linear_method": "log"}, "expected one of .*ternary_quant.*found 'log'"),
        ({"quantization_level_schedule": "linear"}, "full_quant_iteration is None"),
        ({"full_quant_iteration": 300}, "full_quant_iteration is 300"),
        ({"quantization_level_schedule": "linear", "full_quant_iteration": 100}, "after the 100 iterations"),
    ],
)
def test_impossible_options_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        QuantizationOptions(given)


def test_the_command_line_refuses_what_is_no_option():
    with pytest.raises(click.NoSuchOption):
        parse("--quantize_attn_act_inputs")
    with pytest.raises(click.BadParameter):
        parse("--quantize_attn_act_bits=9")


def test_the_help_is_short_and_the_list_is_whole():
    shown = CliRunner().invoke(command, ["--help"]).stdout
    assert len(shown.splitlines()) < 110
    for word in ("--quantize-attn-act-POINT-bits", "pv_mult_p_input", "mlp_down", "--list-quantization", "also a no"):
        assert word in shown
    assert "--quantize-attn-act-softmax-input " not in shown
    listed = CliRunner().invoke(command, ["--list-quantization"]).stdout.splitlines()
    assert [re.match(r"--(\w+) ", line)[1] for line in listed] == list(OPTIONS)
    assert any("default: as --quantize-attn-act-bits" in line for line in listed)
