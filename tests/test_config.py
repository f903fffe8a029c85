"""Configs: every experiment at every scale is valid and whole, and every mistake is named with the way out."""

import importlib
import json
import re
from pathlib import Path

import pytest
from etils import epath

from attn_cnn import cli, schema
from attn_cnn.errors import UserError
from attn_cnn.model import model_fields
from attn_cnn.training import experiment as experiment_lib
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import checked
from attn_cnn.training.runs import load_config
from benchmarks.experiments import EXPERIMENTS
from configs import common, convolution, quadratic, resnet18

SCALES = [(experiment, scale) for experiment in EXPERIMENTS for scale in common.SCALES]
SCALES.remove(("resnet18", "pyramid"))  # its grid halves at every scale


def get_config(experiment, scale=""):
    return importlib.import_module(f"configs.{experiment}").get_config(scale)


def test_every_file_of_configs_is_an_experiment_or_common():
    assert {path.stem for path in Path(common.__file__).parent.glob("*.py")} == {*EXPERIMENTS, "common"}


@pytest.mark.parametrize("experiment, scale", SCALES)
def test_every_experiment_is_valid_at_every_scale(experiment, scale):
    module = importlib.import_module(f"configs.{experiment}")
    checked(module.get_config(scale) if scale else module.get_config())
    assert f"python main.py --config=configs/{experiment}.py" in module.__doc__


@pytest.mark.parametrize("experiment, scale", SCALES)
def test_every_field_stands_in_every_experiment(experiment, scale):
    config = get_config(experiment, scale)
    model = {f"model.{name}" for name in model_fields()[config.model.name]} | {"model.name"}
    assert set(schema.flatten(config)) == set(experiment_lib.FIELDS) | model


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("batch_size", 0, "config.batch_size is 0; it must be a whole number from 1"),
        ("batch_size", 1.5, "config.batch_size is 1.5"),
        ("batch_size", 51_000, "more than the 50,000 images"),
        ("seed", True, "config.seed is True"),
        ("dtype", "float16", "one of float32, bfloat16"),
        ("optimizer.learning_rate", -1.0, "learning_rate is -1.0"),
        ("optimizer.learning_rate", float("nan"), "learning_rate is nan"),
        ("optimizer.decay_epochs", (3, 2), r"increasing"),
        ("optimizer.decay_epochs", (3,), "cosine schedule ignores"),
        ("condition_penalty", 0.5, "condition_penalty is 0.5, but no head of this model has a condition number"),
        ("init_except", ("classifier",), r"init_except is \('classifier',\), but the run starts from no other"),
        ("model.patch", 3, "does not divide the 32x32 image; choose one of 1, 2, 4, 8, 16, 32"),
        ("model.encoding", "sinusoidal", "one of quadratic, quadratic_generalized, learned"),
        (
            "model.share_tables",
            True,
            "config.model.share_tables is True, which the quadratic encoding ignores; set it to False.",
        ),
        ("model.embedding_size", 8, "embedding_size is 8, which the quadratic encoding ignores; set it to 0."),
        ("model.init_spread", 3.0, "init_spread is 3.0, which a random start ignores; set config.model.init to grid"),
        (
            "degenerate_heads",
            "prune",
            "degenerate_heads is prune, but the run starts from no other; set config.init_from",
        ),
        ("freeze", "positons", "freeze is 'positons'; it must be one of none, positions, values, both"),
        ("checkpoint.history_epochs", -1, "history_epochs is -1"),
        ("model.content_init", "mimetic", "content_init is mimetic, which the quadratic encoding ignores; set it to"),
        ("model.heads", (9, 4), r"heads is \(9, 4\), but config.model.layers is 6"),
        ("model.layer", ("attention",) * 7, "but config.model.layers is 6; give one for each layer, or one for all"),
        ("label_smoothing", 1.0, "label_smoothing is 1.0; it must be a number from 0 to below 1"),
        ("optimizer.name", "lion", "one of sgd, adam, muon"),
        (
            "model.merge_before",
            (0,),
            r"merge_before is \(0,\); it must be increasing numbers of layers, counted from 0",
        ),
        (
            "model.merge_before",
            (2, 6),
            r"merge_before is \(2, 6\), but config.model.layers is 6, and layers are counted",
        ),
        ("model.merge_before", (1, 2, 3, 4, 5), r"but the 16x16 grid does not halve 5 times; leave some out"),
        (
            "model.hidden_size",
            (8, 8, 16, 16, 16, 16),
            "changes before layer 2, counted from 0; it can only",
        ),
        ("model.layer", "recurrence", "it must be one of attention, convolution"),
        ("model.name", "vgg", "one of attention, resnet18"),
        ("model.classes", 100, "cifar10 has 10 classes"),
        ("model.image_shape", (28, 28, 1), r"cifar10's images are \(32, 32, 3\)"),
        ("data.name", " ", "digits, the name of a data set of TensorFlow Datasets as cifar10, folder:PATH or npz:PATH"),
        ("data.image_size", 64, "only pictures of a folder are resized"),
        ("data.train_fraction", 1.5, "a number from 0 to 1"),
        ("data.validation_fraction", 1.0, "a number from 0 to below 1"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    config = quadratic.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        checked(config)


def test_a_kernel_is_sized_where_a_layer_is_a_convolution():
    config = quadratic.get_config()
    config.model.kernel_size = 5
    with pytest.raises(UserError, match="config.model.kernel_size is 5, which attention ignores; leave it at 3, or"):
        checked(config)
    config.model.layer = ("attention",) * 5 + ("convolution",)
    assert checked(config).model.kernel_size == 5


def test_heads_that_start_on_a_grid_fill_a_square():
    config = quadratic.get_config()
    config.model.init, config.model.heads = "grid", (9, 4, 1, 25, 9, 8)
    with pytest.raises(UserError, match="config.model.heads is 8; the nearest squares are 4 and 9"):
        checked(config)
    config.model.heads = (9, 4, 1, 25, 9, 0)
    assert checked(config).model.heads == (9, 4, 1, 25, 9, 0)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_only_heads_with_a_condition_number_are_penalised(experiment):
    config = get_config(experiment)
    config.condition_penalty = 0.1
    if experiment in ("quadratic_generalized", "quadratic_pruned"):
        assert checked(config).condition_penalty == 0.1
    else:
        with pytest.raises(UserError, match="config.condition_penalty is 0.1.*; set it to 0"):
            checked(config)


def test_parameters_that_start_afresh_need_a_run_to_start_from():
    config = quadratic.get_config()
    config.init_except = ("classifier",)
    with pytest.raises(UserError, match="set config.init_from"):
        checked(config)
    config.init_from = "runs/other"
    assert checked(config).init_except == ("classifier",)


@pytest.mark.parametrize(
    "experiment, changes, message",
    [
        ("learned", {"degenerate_heads": "prune", "init_from": "runs/a"}, "no head of this model can be degenerate"),
        ("resnet18", {"degenerate_heads": "reset", "init_from": "runs/a"}, "no head of this model can be degenerate"),
        ("resnet18", {"freeze": "values"}, "config.freeze is values, but this model has no heads; set it to none"),
        ("quadratic", {"freeze": "both", "model.heads": 0}, "config.freeze is both, but this model has no heads"),
        (
            "quadratic_generalized",
            {"freeze": "positions", "condition_penalty": 0.5},
            "condition_penalty is 0.5, but config.freeze is positions, which leaves no position to penalise",
        ),
        (
            "quadratic",
            {"figures.every_epochs": 5, "model.heads": 0, "model.init": "random"},
            "figures.every_epochs is 5, but this model has no heads to draw; set it to 0",
        ),
        (
            "quadratic",
            {"checkpoint.history_epochs": 15, "checkpoint.every_epochs": 10},
            "history_epochs is 15, but only every 10 epochs there is a checkpoint",
        ),
    ],
)
def test_what_a_config_asks_of_heads_must_fit_its_model_and_its_start(experiment, changes, message):
    config = get_config(experiment)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        checked(config)


def test_heads_that_are_reset_may_be_penalised_while_the_others_are_frozen():
    config = get_config("quadratic_pruned")
    config.degenerate_heads, config.freeze, config.condition_penalty = "reset", "both", 0.5
    assert checked(config).freeze == "both"


def test_a_field_too_many_or_too_few_is_named():
    config = quadratic.get_config()
    config.bach_size = 3
    with pytest.raises(UserError, match="unknown field config.bach_size; did you mean config.batch_size?"):
        checked(config)
    config = resnet18.get_config()
    del config.model.width
    with pytest.raises(UserError, match="config.model.width is missing; it must be a whole number"):
        checked(config)
    config = quadratic.get_config()
    del config.model
    with pytest.raises(UserError, match="config.model is missing"):
        checked(config)


def test_the_check_leaves_the_config_that_it_is_given_as_it_was():
    config = quadratic.get_config()
    del config.condition_penalty, config.model.kernel_size
    before = config.to_dict()
    assert checked(config).model.kernel_size == 3
    assert config.to_dict() == before


def test_an_unknown_scale_is_named_with_the_choices():
    with pytest.raises(UserError, match="unknown scale 'large'.*:small.*:pyramid.*:digits"):
        quadratic.get_config("large")
    with pytest.raises(UserError, match="unknown scale 'pyramid'; the scales are: none .*:small.*:digits"):
        resnet18.get_config("pyramid")


@pytest.mark.parametrize("scale", common.SCALES)
def test_the_twin_of_quadratic_differs_in_its_layers_alone(scale):
    ours, theirs = quadratic.get_config(scale), convolution.get_config(scale)
    assert workdir_lib.differences(ours, theirs) == ["model.layer: 'convolution' then, 'attention' now"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_papers_run_has_the_papers_optimizer_and_no_label_smoothing_and_no_grid_that_halves(experiment):
    config, tuned = get_config(experiment), experiment == "quadratic_pruned"
    assert config.epochs == (100 if tuned else 300)
    assert (config.batch_size, config.label_smoothing) == (100, 0.0)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 1e-4)
    assert optimizer.learning_rate == (0.01 if tuned else 0.1)
    assert config.model.get("merge_before", ()) == ()


def workdir_of(values, tmp_path):
    """A workdir whose config.json holds `values`, or that text."""
    (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return epath.Path(tmp_path)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_config_survives_its_file(experiment, tmp_path):
    config, workdir = get_config(experiment, "small"), epath.Path(tmp_path)
    workdir_lib.write_config(config, workdir / "config.json")
    assert workdir_lib.read_config(workdir / "config.json").to_dict() == config.to_dict()
    assert workdir_lib.differences(load_config(workdir), config) == []
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_run_from_before_some_fields_existed_did_what_their_defaults_say(tmp_path):
    config = quadratic.get_config()
    values = config.to_dict()
    for name in ("label_smoothing", "condition_penalty", "init_from", "init_except"):
        del values[name]
    for name in ("merge_before", "layer", "kernel_size", "attention_dropout_on", "init", "init_spread"):
        del values["model"][name]
    assert workdir_lib.differences(load_config(workdir_of(values, tmp_path)), config) == []


def test_differences_are_lines_to_read():
    ours, theirs = quadratic.get_config(), quadratic.get_config()
    ours.model.heads, ours.data.dir = 4, "elsewhere"
    assert workdir_lib.differences(ours, theirs) == ["model.heads: 9 then, 4 now"]
    assert workdir_lib.differences(ours, theirs, only=("optimizer.", "dtype")) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": 1}', '{"model": 3}', "\x00", "[" * 100_000])
def test_a_config_file_that_is_none_is_refused(text, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        load_config(workdir_of(text, tmp_path))


def test_a_config_edited_by_hand_is_checked(tmp_path):
    values = quadratic.get_config().to_dict() | {"batch_size": "__import__('os')"}
    with pytest.raises(UserError, match="config.json was changed: config.batch_size is"):
        load_config(workdir_of(values, tmp_path))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} holds no run"):
        load_config(epath.Path(tmp_path))


def test_the_default_workdir_is_named_after_config_and_scale():
    assert cli.workdir_for("configs/quadratic.py") == "runs/quadratic"
    assert cli.workdir_for("/x/y/many_heads.py:small") == "runs/many_heads_small"
