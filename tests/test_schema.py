"""What a config may hold: each kind of field takes what it says it takes, and a config is completed with defaults."""

import math

import ml_collections
import numpy as np
import pytest

from attn_cnn import schema
from attn_cnn.errors import UserError
from attn_cnn.training import experiment
from configs import quadratic

KINDS = {  # field, what it accepts, what it refuses
    "integer": (schema.integer(1, 5), [1, 3, 5], [0, 6, 2.0, True, "3", None, (3,)]),
    "number": (schema.number(0, 1), [0, 1, 0.5], [-0.1, 1.1, math.nan, math.inf, True, "0.5", None]),
    "number below": (schema.number(0, 1, below=True), [0, 0.999], [1, 1.0, -1, math.nan]),
    "choice": (schema.choice("a", "b"), ["a", "b"], ["c", "", "ab", None, ["a"], ("a",)]),
    "boolean": (schema.boolean(), [True, False], [0, 1, "True", None]),
    "text": (schema.text(), ["", "a"], [None, 1, ("a",)]),
    "tuple_of": (schema.tuple_of(lambda v: len(v) == 2, "two"), [(1, 2), ("a", None)], [(), (1,), [1, 2], "ab"]),
    "each_layer": (
        schema.each_layer(schema.integer(1, 5)),
        [1, 5, (1,), (1, 2, 3)],
        [0, 6, (), (1, 6), (1, True), [1], ((1,),), "1", None],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_field_accepts_what_it_says(kind):
    field, accepted, refused = KINDS[kind]
    assert [v for v in accepted if not field.accepts(v)] == []
    assert [v for v in refused if field.accepts(v)] == []
    assert field.default is schema.REQUIRED


@pytest.mark.parametrize(
    "field, wanted",
    [
        (schema.integer(1, 65_536), "a whole number from 1 to 65,536"),
        (schema.number(0, 1e6), "a number from 0 to 1e+06"),
        (schema.number(0, 1, below=True), "a number from 0 to below 1"),
        (schema.choice("a", "b"), "one of a, b"),
        (schema.boolean(), "True or False"),
        (schema.text(), "text"),
        (schema.tuple_of(bool, "increasing whole numbers"), "increasing whole numbers"),
        (schema.each_layer(schema.boolean()), "True or False, or a tuple with one for each layer"),
    ],
)
def test_what_a_field_accepts_is_said_in_words(field, wanted):
    with pytest.raises(UserError) as error:
        schema.check({"name": None}, {"name": field}, "config.")
    assert str(error.value) == f"config.name is None; it must be {wanted}."


@pytest.mark.parametrize(
    "field",
    [
        schema.integer(0, 9, default=3),
        schema.number(0, 9, default=3),
        schema.choice("a", default="a"),
        schema.boolean(default=False),
        schema.text(default=""),
        schema.tuple_of(lambda v: v == (), "nothing", default=()),
        schema.each_layer(schema.integer(0, 9, default=3)),
    ],
)
def test_a_default_is_a_value_that_the_field_accepts(field):
    assert field.default is not schema.REQUIRED and field.accepts(field.default)


def test_one_value_is_for_all_layers_and_a_tuple_is_one_for_each():
    assert schema.for_each_layer(9, 3) == (9, 9, 9)
    assert schema.for_each_layer("attention", 2) == ("attention", "attention")
    assert schema.for_each_layer((9, 4, 9), 3) == (9, 4, 9)


def test_a_field_of_one_or_each_becomes_a_tuple_where_another_would_not():
    config = ml_collections.ConfigDict({"heads": schema.one_or_each(9), "layers": 6})
    config.heads = (9, 4)
    assert config.heads == (9, 4)
    config.heads = 16
    assert config.heads == 16
    with pytest.raises(TypeError):
        config.layers = (9, 4)


def test_names_have_dots():
    config = ml_collections.ConfigDict({"seed": 0, "data": {"name": "digits", "crop": {"padding": 1}}, "none": {}})
    assert schema.flatten(config) == {"seed": 0, "data.name": "digits", "data.crop.padding": 1}


FIELDS = {
    "seed": schema.integer(0, 9),
    "penalty": schema.number(0, 1, default=0.0),
    "data.name": schema.text(),
    "data.flip": schema.boolean(default=True),
    "data.crop.padding": schema.integer(0, 9, default=4),
}


def test_fields_that_are_missing_have_their_defaults_however_deep():
    config = ml_collections.ConfigDict({"data": {"name": "digits"}})
    completed = schema.completed(config, FIELDS)
    assert completed.to_dict() == {
        "penalty": 0.0,
        "data": {"name": "digits", "flip": True, "crop": {"padding": 4}},
    }
    assert config.to_dict() == {"data": {"name": "digits"}}


def test_what_is_there_stays_and_the_copy_is_a_copy():
    config = ml_collections.ConfigDict({"penalty": 1.0, "data": {"flip": False, "crop": {"padding": 0}}, "other": 1})
    completed = schema.completed(config, FIELDS)
    assert completed.to_dict() == config.to_dict()
    completed.data.flip = True
    assert config.data.flip is False


@pytest.mark.parametrize(
    "values", [{}, {"data": 3}, {"data": "digits"}, {"penalty": {"a": 1}, "data": {"flip": {}, "crop": 1}}]
)
def test_what_stands_in_the_place_of_fields_is_left_to_the_check(values):
    config = schema.completed(ml_collections.ConfigDict(values), FIELDS)
    assert config.to_dict() == {"penalty": 0.0} | values
    with pytest.raises(UserError):
        schema.check(schema.flatten(config), FIELDS, "config.")


def test_a_name_too_many_comes_with_the_one_that_was_meant_or_those_that_there_are():
    with pytest.raises(UserError, match=r"^unknown field config.sede; did you mean config.seed\?$"):
        schema.check({"sede": 1}, FIELDS, "config.")
    with pytest.raises(UserError, match=r"^unknown field config.xyz; the fields are data.crop.padding, data.flip, "):
        schema.check({"xyz": 1}, FIELDS, "config.")


def test_a_name_too_few_comes_with_what_it_must_be():
    with pytest.raises(UserError, match=r"^config.seed is missing; it must be a whole number from 0 to 9.$"):
        schema.check({"penalty": 0, "data.name": "", "data.flip": True, "data.crop.padding": 1}, FIELDS, "config.")


def test_the_scalars_of_a_sweep_count_as_numbers():
    config = quadratic.get_config("digits")
    with config.ignore_type():
        config.optimizer.learning_rate, config.seed = np.float32(0.5), np.int64(3)
        config.data.flip, config.model.heads = np.bool_(False), (np.int32(4), 0, 9)
    checked = experiment.checked(config)
    assert (checked.optimizer.learning_rate, checked.seed, checked.data.flip) == (0.5, 3, False)
    assert checked.model.heads == (4, 0, 9)
    assert {type(v) for v in schema.flatten(checked).values()} <= {int, float, bool, str, tuple}


@pytest.mark.parametrize(
    "given, meant",
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("model.head", "model.heads"),
        ("batchsize", "batch_size"),
        ("heads", "model.heads"),
        ("model.xyz", None),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_one_that_was_meant(given, meant):
    known = ("optimizer.learning_rate", "model.heads", "model.layers", "batch_size", "seed")
    assert schema.nearest(given, known) == meant
