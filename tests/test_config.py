"""Configs: every experiment at every scale is valid, and every mistake is named with the way out."""

import importlib
import json

import pytest
from etils import epath

from attn_cnn import config as config_lib
from attn_cnn.errors import UserError
from configs import common, quadratic, resnet18

EXPERIMENTS = (
    "quadratic", "quadratic_generalized", "many_heads", "learned", "learned_query", "learned_content", "resnet18",
)  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("scale", common.SCALES)
def test_every_experiment_is_valid_at_every_scale(experiment, scale):
    module = importlib.import_module(f"configs.{experiment}")
    config_lib.check(module.get_config(scale) if scale else module.get_config())
    assert f"python main.py --config=configs/{experiment}.py" in module.__doc__


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
        ("model.patch", 3, "does not divide the 32x32 image; choose one of 1, 2, 4, 8, 16, 32"),
        ("model.encoding", "sinusoidal", "one of quadratic, quadratic_generalized, learned"),
        ("model.share_tables", True, "has no tables"),
        ("model.name", "vgg", "one of attention, resnet18"),
        ("model.classes", 100, "cifar10 has 10 classes"),
        ("model.image_shape", (28, 28, 1), r"cifar10's images are \(32, 32, 3\)"),
        ("data.name", "imagenet", "one of cifar10, cifar100, digits"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    config = quadratic.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


def test_a_field_too_many_or_too_few_is_named():
    config = quadratic.get_config()
    config.bach_size = 3
    with pytest.raises(UserError, match="unknown field config.bach_size; the fields are batch_size"):
        config_lib.check(config)
    config = resnet18.get_config()
    del config.model.width
    with pytest.raises(UserError, match="config.model.width is missing; it must be a whole number"):
        config_lib.check(config)


def test_an_unknown_scale_is_named_with_the_choices():
    with pytest.raises(UserError, match="unknown scale 'large'.*:small.*:digits"):
        quadratic.get_config("large")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_config_survives_its_file(experiment, tmp_path):
    config = importlib.import_module(f"configs.{experiment}").get_config("small")
    path = epath.Path(tmp_path) / "config.json"
    config_lib.save(config, path)
    assert config_lib.differences(config_lib.load(path), config) == []
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_a_run_from_before_a_choice_existed_made_the_only_one(tmp_path):
    path, config = epath.Path(tmp_path) / "config.json", quadratic.get_config()
    values = config.to_dict()
    del values["model"]["attention_dropout_on"]
    path.write_text(json.dumps(values))
    assert config_lib.differences(config_lib.load(path), config) == []


def test_differences_are_lines_to_read():
    ours, theirs = quadratic.get_config(), quadratic.get_config()
    ours.model.heads, ours.data.dir = 4, "elsewhere"
    assert config_lib.differences(ours, theirs) == ["model.heads: 9 then, 4 now"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": 1}', '{"model": 3}', "\x00"])
def test_a_config_file_that_is_none_is_refused(text, tmp_path):
    path = epath.Path(tmp_path) / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="config.json"):
        config_lib.load(path)


def test_a_config_edited_by_hand_is_checked(tmp_path):
    path = epath.Path(tmp_path) / "config.json"
    values = quadratic.get_config().to_dict() | {"batch_size": "__import__('os')"}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="config.json.*batch_size is"):
        config_lib.load(path)


def test_the_default_workdir_is_named_after_config_and_scale():
    assert config_lib.default_workdir("configs/quadratic.py") == "runs/quadratic"
    assert config_lib.default_workdir("/x/y/many_heads.py:small") == "runs/many_heads_small"
