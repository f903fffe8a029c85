"""A trained ResNet becomes attention layers that compute the same, a workdir like any other, and trains on."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from etils import epath
from flax import traverse_util

from attn_cnn import report, train
from attn_cnn.convolution import __main__
from attn_cnn.convolution import express as express_lib
from attn_cnn.convolution.express import express, express_run, expressed_params
from attn_cnn.convolution.moves import describe, moves, moves_of_run
from attn_cnn.convolution.theorem import EXACT_SPREAD
from attn_cnn.encodings import window
from attn_cnn.errors import UserError
from attn_cnn.model import abstract_variables, undecayed
from attn_cnn.torch_export import export_variables
from attn_cnn.training.runs import load_config, load_run
from configs import resnet18

RESNET = program.WORKDIRS / "resnet18"
SOFT = 10**0.5


def attention_config():
    config = resnet18.get_config("digits")
    config.model.layer = "attention"
    return config


# The network


def test_a_resnet_of_attention_has_what_its_convolutions_become():
    config = resnet18.get_config("digits")
    convolutions = jax.eval_shape(lambda: abstract_params(config))
    expressed = jax.eval_shape(lambda: expressed_params(abstract_params(config), 16.0))
    assert shapes(expressed) == shapes(abstract_variables(attention_config().model)["params"])
    kept = [path for path in shapes(convolutions) if path in shapes(expressed)]
    assert any("shortcut" in path for path in kept) and not any("conv1" in path for path in kept)


def abstract_params(config):
    return jax.tree.map(lambda a: jnp.zeros(a.shape), abstract_variables(config.model)["params"])


def shapes(params):
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


def test_it_counts_the_same_multiply_adds():
    assert report.paper_flops(attention_config().model) == report.paper_flops(resnet18.get_config("digits").model)


def test_weight_decay_spares_its_centers_and_spreads():
    assert undecayed(attention_config().model) == ("centers", "spreads")


def test_the_papers_code_has_no_such_network():
    model = attention_config().model
    with pytest.raises(UserError, match="no ResNet of attention layers; set config.model.layer to convolution"):
        export_variables(jax.tree.map(lambda a: np.zeros(a.shape), abstract_variables(model)), model)


# The run


@pytest.fixture(scope="module")
def expressed(tmp_path_factory):
    """The fixture's run as attention: its workdir, and how it compares."""
    out = tmp_path_factory.mktemp("express") / "attention"
    return out, express(RESNET, out, EXACT_SPREAD)


@pytest.mark.slow
def test_logits_agree_and_so_does_every_prediction(expressed):
    _, result = expressed
    assert result.logits < 1e-4 and result.agreement == 1.0
    assert result.accuracies[0] == result.accuracies[1]


@pytest.mark.slow
def test_each_layer_stands_in_the_table_with_error_time_and_parameters(expressed):
    _, result = expressed
    assert len(result.layers) == 17  # of the 20 convolutions three have one pixel
    for layer in result.layers:
        rows, columns, inputs, outputs = layer.kernel
        assert layer.error < 1e-5 and min(layer.seconds) > 0
        heads = rows * columns
        assert layer.parameters == (heads * inputs * outputs, heads * inputs * outputs + 3 * heads + outputs)
    text = express_lib.describe(result)
    assert text.count("3x3x") == 17 and "images that get the same class  100.00%" in text


@pytest.mark.slow
def test_it_evaluates_like_any_other_run(expressed):
    workdir, result = expressed
    config = load_config(epath.Path(workdir))
    assert config.model.layer == "attention"
    assert train.evaluate(config, workdir)["accuracy"] == pytest.approx(result.accuracies[1])
    assert load_run(workdir).step == load_run(RESNET).step


@pytest.mark.slow
def test_it_trains_on_and_its_heads_move(tmp_path):
    result = express(RESNET, tmp_path / "soft", SOFT)
    assert result.logits > 0 and result.agreement > 0.5
    config = program.tiny_config(resnet18, epochs=1)
    config.model.layer, config.init_from = "attention", str(tmp_path / "soft")
    train.train(config, tmp_path / "on")
    of_layers = moves_of_run(load_run(tmp_path / "on"))
    assert len(of_layers) == 17
    wide = [layer for layer in of_layers if layer.name.startswith(("conv1", "stage0", "stage1"))]
    assert len(wide) == 9
    assert all(layer.mean > 1e-4 and layer.squared_spreads[0] < layer.squared_spreads[2] for layer in wide)


@pytest.mark.slow
def test_at_the_exact_spread_its_heads_are_on_the_window(expressed):
    workdir, _ = expressed
    of_layers = moves_of_run(load_run(workdir))
    assert [(layer.largest, layer.squared_spreads[0]) for layer in of_layers] == [(0.0, 256.0)] * 17


@pytest.mark.slow
def test_gradients_reach_centers_and_spreads_of_every_layer_at_s_squared_10():
    run = express_run(load_run(RESNET), SOFT)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 1))  # so that all grids have neighbours

    def loss(params):
        variables = {"params": params, "batch_stats": run.batch_stats}
        return jnp.square(run.model.apply(variables, images, train=False)).sum()

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(run.params))
    moving = {path: g for path, g in gradients.items() if path[-1] in ("centers", "spreads")}
    assert len(moving) == 34
    assert all(np.abs(gradient).max() > 0 for gradient in moving.values())


def test_what_is_no_resnet_of_convolutions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no ResNet's \(config.model.name is attention\)"):
        express(program.WORKDIRS / "quadratic_heads_by_layer", tmp_path / "out", EXACT_SPREAD)
    with pytest.raises(UserError, match="has attention layers already"):
        express_lib.expressed_config(attention_config())


def test_a_workdir_with_a_run_is_not_overwritten():
    with pytest.raises(UserError, match="resnet18 holds a run already"):
        express(RESNET, RESNET, EXACT_SPREAD)


def test_moves_are_distances_from_the_window():
    centers = window(3) + np.array([[0.3, 0.4]] + [[0, 0]] * 7 + [[0, 0.6]])
    params = {"block": {"conv": {"centers": centers, "spreads": np.full(9, 2.0)}, "norm": {"scale": np.ones(3)}}}
    (layer,) = moves(params)
    assert layer.name == "block/conv" and layer.heads == 9
    assert layer.mean == pytest.approx(1.1 / 9) and layer.largest == pytest.approx(0.6)
    assert layer.strayed == 1 and layer.squared_spreads == (4.0, 4.0, 4.0)
    assert "1 of 9" in describe([layer])


def test_moves_are_of_a_resnet_of_attention():
    with pytest.raises(UserError, match="no ResNet of attention layers; make one with express"):
        moves_of_run(load_run(RESNET))


# The command


command = functools.partial(program.run_module, "attn_cnn.convolution")


@pytest.mark.slow
def test_the_command_makes_the_run_and_prints_the_table(tmp_path):
    done = command("express", f"--workdir={RESNET}", f"--out={tmp_path / 'attention'}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"images that get the same class +100.00%", done.stdout) and "stage3_block1/conv2" in done.stdout
    done = command("moves", f"--workdir={tmp_path / 'attention'}")
    assert done.returncode == 0 and "0 of 9" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["invert", "--workdir=x"], "'invert' is no command; the commands are express, recover, moves"),
        (["express", "--out=y"], "express needs --workdir=RUN."),
        (["recover"], "recover needs --workdir=RUN, or --maps=FILE in its place."),
        (["express", "--workdir=x"], "--out is missing"),
        (["express", "--workdir=x", "--out=y", "--maps=z.npz"], "--maps goes with recover, not with express"),
        (["recover", "--workdir=x", "--spread=3"], "--spread goes with express, not with recover"),
        (["recover", "--maps=x", "--images=3"], "--images goes with --workdir, not with --maps"),
        (["recover", "--workdir=x", "--tune"], "--out is missing"),
    ],
)
def test_flags_that_a_command_ignores_are_refused(arguments, message):
    assert message in program.refusal(__main__, *arguments)


def test_flags_that_go_together_are_not_refused():
    arguments = ("recover", "--workdir=x", "--out=y", "--tune", "--images=3", "--step=best")
    assert program.refusal(__main__, *arguments) == ""
