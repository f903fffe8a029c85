"""Every field of every config, given every kind of wrong value: a message before any compilation, or a run.

The cases are generated from the configs themselves. A value that the check lets through is traced into a whole
training step, without compiling it.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from test_config import EXPERIMENTS

from attn_cnn import config as config_lib
from attn_cnn import devices, train
from attn_cnn.errors import UserError

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


def fields(config):
    return list(config_lib._flatten(config))


CASES = [
    (experiment, field)
    for experiment in EXPERIMENTS
    for field in fields(importlib.import_module(f"configs.{experiment}").get_config("digits"))
]


def trace_step(config):
    """Everything up to compilation."""
    run = train.create_run(config)
    spec = run.spec
    images = jax.ShapeDtypeStruct((spec.train_size, *spec.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((spec.train_size,), jnp.int32)
    indices = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    step = devices.mapped(functools.partial(train.train_step, run=run), arguments=5)
    jax.eval_shape(step, train.abstract_state(run), images, labels, indices, devices.share(config.batch_size))


@pytest.mark.parametrize("experiment, field", CASES)
def test_a_wrong_value_is_a_message_or_a_run(experiment, field):
    refused = []
    for kind, value in WRONG.items():
        config = importlib.import_module(f"configs.{experiment}").get_config("digits")
        parent, _, name = field.rpartition(".")
        holder = config[parent] if parent else config
        original = holder[name]
        with holder.ignore_type():
            holder[name] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
        value = holder[name]  # ConfigDict itself makes an int a float where the field holds one
        try:
            config_lib.check(config)
        except UserError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 1000
            refused.append(kind)
            continue
        assert type(value) is type(original), kind
        if experiment in ("quadratic", "learned_query", "resnet18") and field.startswith(
            ("model", "optimizer", "batch")
        ):
            try:
                trace_step(config)
            except UserError as error:
                assert "GiB" in str(error) or "config." in str(error)
    assert {"dict", "none", "nan"} <= set(refused)


@pytest.mark.parametrize("experiment, field", CASES)
def test_a_missing_field_is_named(experiment, field):
    config = importlib.import_module(f"configs.{experiment}").get_config("digits")
    parent, _, name = field.rpartition(".")
    del (config[parent] if parent else config)[name]
    with pytest.raises(UserError, match=f"{name}"):
        config_lib.check(config)
