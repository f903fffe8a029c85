"""Every field of every config, given every kind of wrong value: a message before any compilation, or a run.

The cases are generated from the configs themselves. Values that the check lets through, and that may change shapes, are
traced into a whole training step of a tiny model, without compiling it.
"""

import jax
import ml_collections
import numpy as np
import pytest
from test_config import EXPERIMENTS, get_config

from attn_cnn import schema
from attn_cnn.errors import UserError
from attn_cnn.model import model_fields
from attn_cnn.training import devices, steps
from attn_cnn.training import experiment as experiment_lib
from attn_cnn.training.experiment import abstract_state, checked, create_experiment

WRONG = {
    "text": "abc",
    "empty text": "",
    "list": [1],
    "dict": {"a": 1},
    "none": None,
    "true": True,
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "negative fraction": -0.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "absurd": 10**30,
    "large": 60_000,
    "large fraction": 1e30,
    "empty tuple": (),
    "tuple of text": ("a",),
    "negative tuple": (-1, 2, 3),
    "long tuple": tuple(range(1, 50)),
}
ONE_OR_EACH = {
    "model.heads",
    "model.layer",
    "model.hidden_size",
    "model.mlp_size",
}  # the fields that may be a tuple beside what they are
TINY = {
    "batch_size": 4,
    "model.layers": 1,
    "model.heads": 4,
    "model.hidden_size": 8,
    "model.mlp_size": 8,
    "model.width": 1,
}
TRACED = [  # what passes the check and may change shapes
    ("quadratic", "model.attention_dropout", "zero"),
    ("quadratic", "model.attention_dropout", "fraction"),
    ("quadratic", "model.dropout", "fraction"),
    ("quadratic", "model.heads", "zero"),
    ("quadratic", "model.hidden_size", "large"),
    ("quadratic", "model.mlp_size", "large"),
    ("quadratic", "label_smoothing", "fraction"),
    ("quadratic", "optimizer.warmup", "zero"),
    ("quadratic", "optimizer.warmup", "fraction"),
    ("quadratic_generalized", "model.heads", "zero"),
    ("learned", "model.embedding_size", "large"),
    ("learned", "model.heads", "zero"),
    ("learned", "model.share_tables", "true"),
    ("learned_query", "model.attention_dropout", "zero"),
    ("learned_query", "model.attention_dropout", "fraction"),
    ("learned_query", "model.share_tables", "true"),
    ("learned_content", "model.share_tables", "true"),
    ("learned_content_position", "model.share_tables", "true"),
    ("gated", "model.heads", "zero"),
    ("gated", "model.init_spread", "zero"),
    ("resnet18", "optimizer.decay_epochs", "long tuple"),
]


def all_fields(experiment):
    return list(schema.flatten(get_config(experiment, "digits")))


# The fields of a run are the same in all experiments, but for the schedule, which is the ResNet's own.
CASES = [
    (experiment, field)
    for experiment in EXPERIMENTS
    for field in all_fields(experiment)
    if field.startswith("model.") or experiment in ("quadratic", "resnet18")
]


def with_value(experiment, field, value):
    """The config with one field changed, and that field's value now and before."""
    config = get_config(experiment, "digits")
    parent, _, name = field.rpartition(".")
    holder = config[parent] if parent else config
    original = holder[name]
    with holder.ignore_type():
        holder[name] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    return config, holder[name], original  # ConfigDict itself makes an int a float where the field holds one


@pytest.mark.parametrize("experiment, field", CASES)
def test_a_wrong_value_is_a_message_or_of_the_right_kind(experiment, field):
    refused = set()
    for kind, wrong in WRONG.items():
        config, value, original = with_value(experiment, field, wrong)
        try:
            checked(config)
        except UserError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 1000
            refused.add(kind)
        else:
            assert type(value) is type(original) or (field in ONE_OR_EACH and type(value) is tuple), kind
    assert {"dict", "none", "nan"} <= refused


def trace_step(config):
    """Everything up to compilation: the shapes of the state before and after the step, and of the loss."""
    experiment = create_experiment(config)
    spec, batch = experiment.spec, experiment.config.batch_size
    inputs = steps.Inputs(
        images=jax.ShapeDtypeStruct((spec.train_size, *spec.image_shape), np.uint8),
        labels=jax.ShapeDtypeStruct((spec.train_size,), np.int32),
        indices=jax.ShapeDtypeStruct((batch,), np.int32),
    )
    step = steps.compile_train_step(experiment)
    before = abstract_state(experiment)
    after, loss = jax.eval_shape(step, before, inputs, devices.shares(batch))
    return before, after, loss


@pytest.mark.slow
@pytest.mark.parametrize("experiment, field, kind", TRACED)
def test_a_value_that_passes_makes_a_training_step_or_is_too_large(experiment, field, kind):
    config, _, _ = with_value(experiment, field, WRONG[kind])
    present = schema.flatten(config)
    config.update_from_flattened_dict({k: v for k, v in TINY.items() if k in present and k != field})
    try:
        before, after, loss = trace_step(checked(config))
    except UserError as error:
        assert kind == "large" and "GiB" in str(error)
    else:
        assert (after, loss.shape) == (before, ())


DEFAULTS = {"label_smoothing", "condition_penalty", "init_from", "init_except", "micro_batch_size"}
DEFAULTS |= {"degenerate_heads", "freeze", "checkpoint.history_epochs", "figures.every_epochs"}
DEFAULTS |= {
    f"data.{name}" for name in ("train_split", "test_split", "image_size", "train_fraction", "validation_fraction")
}
DEFAULTS |= {
    f"model.{name}"
    for name in (
        "merge_before",
        "layer",
        "kernel_size",
        "attention_dropout_on",
        "content_init",
        "init",
        "init_spread",
        "embedding_size",
        "share_tables",
    )
}


@pytest.mark.parametrize("experiment, field", CASES)
def test_a_missing_field_is_named_or_has_its_default(experiment, field):
    config = get_config(experiment, "digits")
    parent, _, name = field.rpartition(".")
    del (config[parent] if parent else config)[name]
    if field in DEFAULTS:
        model = {f"model.{name}": field for name, field in model_fields()[config.model.name].items()}
        assert schema.flatten(checked(config))[field] == (experiment_lib.FIELDS | model)[field].default
    else:
        with pytest.raises(UserError, match=f"config.{field} is "):
            checked(config)
