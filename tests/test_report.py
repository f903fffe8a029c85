"""describe: the parameters and FLOPs of the experiments are the paper's."""

import importlib

import pytest

from attn_cnn import report

TABLE = {  # parameters, and the paper's FLOPs where it gives them
    "quadratic": (12_086_844, "6.2B"),
    "quadratic_generalized": (12_087_006, None),
    "many_heads": (18_806_970, None),
    "learned": (12_278_682, "6.2B"),
    "learned_query": (20_822_682, None),
    "learned_content": (29_484_282, "15B"),
    "resnet18": (11_173_962, "1.1B"),
}


@pytest.mark.parametrize("experiment", TABLE)
def test_parameters_and_flops(experiment):
    model = importlib.import_module(f"configs.{experiment}").get_config().model
    parameters, flops = TABLE[experiment]
    assert report.count_parameters(report.abstract_variables(model)["params"]) == parameters
    if flops:
        assert report._si(report.paper_flops(model)) == flops


def test_the_compiler_counts_at_least_the_linear_layers():
    model = importlib.import_module("configs.quadratic").get_config("digits").model
    linear, whole = report.paper_flops(model), report.compiled_flops(model)
    assert linear < whole < 2 * linear


def test_describe_names_every_parameter_and_the_totals():
    model = importlib.import_module("configs.quadratic").get_config("digits").model
    text = report.describe(model)
    lines = [line.split() for line in text.splitlines()]
    assert ["layer_2/attention/value/kernel", "9x64x64", "36,864"] in lines
    total = report.count_parameters(report.abstract_variables(model)["params"])
    assert f"{total:,}" in text and "paper's way" in text and "compiler's" in text
