"""What describe prints: the parameters and FLOPs of the experiments are the paper's."""

import importlib

import pytest
from test_config import EXPERIMENTS

from attn_cnn import report
from attn_cnn.model import abstract_variables
from configs import convolution, quadratic, resnet18

TABLE = {  # parameters, and the paper's FLOPs where it gives them
    "quadratic": (12_086_844, "6.2B"),
    "quadratic_generalized": (12_087_006, None),
    "quadratic_pruned": (12_087_006, None),  # before its heads are pruned
    "many_heads": (18_806_970, None),
    "learned": (12_278_682, "6.2B"),
    "learned_query": (20_822_682, None),
    "learned_content": (29_484_282, "15B"),
    "learned_content_position": (29_601_882, None),
    "gated": (29_410_098, None),
    "convolution": (12_086_682, None),
    "resnet18": (11_173_962, "1.1B"),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_config_has_the_parameters_and_flops_of_the_table_and_of_its_docstring(experiment):
    module = importlib.import_module(f"configs.{experiment}")
    model, (parameters, flops) = module.get_config().model, TABLE[experiment]
    counted = report.paper_flops(model)
    assert report.count_parameters(abstract_variables(model)["params"]) == parameters
    assert flops in (None, report.in_letters(counted))
    assert f"{parameters / 1e6:.1f}M parameters, {counted / 1e9:.2g} GFLOPs an image" in module.__doc__


def test_networks_compared_at_laptop_scale_have_about_as_many_parameters():
    models = [module.get_config("small").model for module in (quadratic, convolution, resnet18)]
    numbers = [report.count_parameters(abstract_variables(model)["params"]) for model in models]
    assert max(numbers) < 1.03 * min(numbers)


def test_flops_count_the_pixels_of_each_layers_own_grid():
    model = quadratic.get_config("digits").model
    model.update(layers=2, hidden_size=(8, 16), mlp_size=(8, 32), heads=4, merge_before=(1,), patch=2)
    embedding, merge, classifier = 16 * 4 * 8, 4 * 32 * 16, 16 * 10
    first, second = (pixels * (4 * d * d + d * d + 2 * d * m) for pixels, d, m in ((16, 8, 8), (4, 16, 32)))
    assert report.paper_flops(model) == 2 * (embedding + first + merge + second + classifier)


@pytest.fixture
def model():
    model = quadratic.get_config("digits").model
    model.layers = 1
    return model


def test_two_digits_and_a_letter():
    numbers = (0, 950, 1_249, 5_560_000, 14_999_999_999)
    assert list(map(report.in_letters, numbers)) == ["0", "950", "1.2K", "5.6M", "15B"]


def test_the_compiler_counts_at_least_the_linear_layers(model):
    linear, whole = report.paper_flops(model), report.compiled_flops(model)
    assert linear < whole < 2 * linear


@pytest.mark.slow
def test_the_compiler_counts_attention_in_the_place_of_convolutions_in_full():
    convolutions, attention = (resnet18.get_config("digits").model for _ in range(2))
    attention.layer = "attention"
    assert report.compiled_flops(attention) >= report.compiled_flops(convolutions)


def test_describe_names_every_parameter_and_the_totals(model):
    text = report.describe(model)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["layer_0/attention/value/kernel", "(9, 64, 64)", "float32", "36,864"] in rows
    total = report.count_parameters(abstract_variables(model)["params"])
    assert sum(int(row[3].replace(",", "")) for row in rows if row and row[0] != "Name") == total
    assert f"parameters                    {total:,}" in text and "paper's way" in text and "compiler's" in text
