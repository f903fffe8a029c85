"""Heads pruned, reset and frozen: what is chosen changes, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden import Golden, assert_close, flat, small_model

from attn_cnn.encodings import ENCODINGS
from attn_cnn.heads import surgery
from attn_cnn.heads.surgery import Surgery
from attn_cnn.model import abstract_variables, create_model
from attn_cnn.training.optim import create_optimizer
from configs import quadratic

CHOSEN = {0: {1}, 1: {0, 2}}


def config_of(encoding, **changes):
    return small_model(encoding, heads=3, **changes)


@functools.cache
def params_of(encoding, seed=0, share_tables=False):
    """Returns random parameters of a small model with two layers of three heads."""
    model = config_of(encoding, share_tables=share_tables)
    shapes = abstract_variables(model)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


# Which heads


def test_heads_are_numbered_as_they_stand_and_kept_as_the_config_numbers_them():
    whole = surgery.untouched(config_of("quadratic"))
    assert whole == Surgery(((0, 1, 2), (0, 1, 2)), ((), ()))
    once = whole.pruned({0: {1}})
    assert once.kept == ((0, 2), (0, 1, 2))
    assert once.pruned({0: {1}, 1: {0, 1, 2}}).kept == ((0,), ())
    assert once.with_reset({0: {1}}) == Surgery(((0, 2), (0, 1, 2)), ((2,), ()))
    assert once.with_reset({0: {0, 1}}).pruned({0: {0}}) == Surgery(((2,), (0, 1, 2)), ((2,), ()))


def test_a_model_that_lost_heads_has_no_square_to_start_on():
    model = small_model("quadratic", heads=4, init="grid", init_spread=0.5)
    after = surgery.with_remaining_heads(model, surgery.untouched(model).pruned({1: {3}}))
    assert abstract_variables(after)["params"]["layer_1"]["attention"]["spreads"].shape == (3,)
    assert surgery.with_remaining_heads(model, surgery.untouched(model)) == model
    assert surgery.with_remaining_heads(model, None) == model


# Prune


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_left_has_the_shapes_of_a_model_with_fewer_heads_and_the_other_heads_numbers(encoding):
    params = params_of(encoding)
    pruned = surgery.prune(params, config_of(encoding), CHOSEN)
    wanted = abstract_variables(small_model(encoding, heads=(2, 1)))["params"]
    assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(jnp.shape, wanted)
    axes = surgery.head_axes(config_of(encoding))
    for path, leaf in traverse_util.flatten_dict(pruned).items():
        before = traverse_util.flatten_dict(params)[path]
        kept = {"layer_0": [0, 2], "layer_1": [1]}.get(path[0])
        if axes[path] is not None:
            before = np.take(before, kept, axes[path])
        np.testing.assert_array_equal(leaf, before)


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
def test_a_layer_that_loses_all_its_heads_keeps_the_bias_of_its_value(encoding):
    pruned = surgery.prune(params_of(encoding), config_of(encoding), {1: {0, 1, 2}})
    assert list(flat(pruned["layer_1"]["attention"])) == ["value/bias"]
    wanted = abstract_variables(small_model(encoding, heads=(3, 0)))["params"]
    assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(jnp.shape, wanted)


def test_shared_tables_stay_where_they_are():
    model, params = config_of("learned", share_tables=True), params_of("learned", share_tables=True)
    pruned = surgery.prune(params, model, {0: {0}, 1: {0, 1, 2}})
    np.testing.assert_array_equal(pruned["row_embeddings"], params["row_embeddings"])


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["quadratic_generalized", "learned_content_position", "gated"])
@pytest.mark.parametrize("chosen", [CHOSEN, {1: {0, 1, 2}}])
def test_a_head_whose_value_is_zero_changes_no_logit_when_it_is_pruned(encoding, chosen):
    images, params = jnp.asarray(Golden("quadratic").images), flat(params_of(encoding))
    for layer, heads in chosen.items():
        name = f"layer_{layer}/attention/value/kernel"
        params[name] = params[name].at[jnp.array(list(heads))].set(0)
    params = traverse_util.unflatten_dict(params, sep="/")
    model = config_of(encoding)
    after = surgery.with_remaining_heads(model, surgery.untouched(model).pruned(chosen))
    logits = create_model(model).apply({"params": params}, images)
    assert_close(create_model(after).apply({"params": surgery.prune(params, model, chosen)}, images), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("chosen", [CHOSEN, {1: {0, 1, 2}}])
def test_an_optimizers_state_of_what_remains_stays(name, chosen):
    config = quadratic.get_config("small").optimizer
    config.name = name
    model, params, optimizer = config_of("quadratic"), params_of("quadratic"), create_optimizer(config, 0.1)
    _, state = optimizer.update(params_of("quadratic", seed=1), optimizer.init(params), params)
    pruned = surgery.prune(state, model, chosen)
    after = optimizer.init(surgery.prune(params, model, chosen))
    assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(jnp.shape, after)
    before, axes = dict(jax.tree_util.tree_leaves_with_path(state)), surgery.head_axes(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(pruned):
        parameter = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        parameter = parameter[next((n for n, key in enumerate(parameter) if parameter[n:] in axes), 0) :]
        axis = axes.get(parameter)
        kept = [h for h in range(3) if axis is not None and h not in chosen.get(int(parameter[0][-1]), ())]
        np.testing.assert_array_equal(leaf, before[path] if axis is None else np.take(before[path], kept, axis))


# Reset


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["quadratic_generalized", "learned", "gated"])
def test_reset_heads_are_fresh_in_every_slice_and_nothing_else_changes(encoding):
    model, params, fresh = config_of(encoding), params_of(encoding), params_of(encoding, seed=1)
    axes = surgery.head_axes(model)
    after = traverse_util.flatten_dict(surgery.reset(params, fresh, model, CHOSEN))
    before, fresh = (traverse_util.flatten_dict(tree) for tree in (params, fresh))
    of_heads = [path for path, axis in axes.items() if axis is not None]
    assert any(path[-2:] == ("value", "kernel") for path in of_heads)
    for path, leaf in after.items():
        if axes[path] is None:
            np.testing.assert_array_equal(leaf, before[path])
            continue
        chosen = CHOSEN[int(path[0][-1])]
        for head in range(3):
            expected = fresh if head in chosen else before
            np.testing.assert_array_equal(*(jnp.take(a, head, axes[path]) for a in (leaf, expected[path])))


# Freeze


def frozen_names(encoding, freeze, surgery_done=None, fresh=()):
    masks = surgery.frozen(config_of(encoding), freeze, surgery_done, lambda path: "/".join(path) in fresh)
    return {name: mask for name, mask in flat(masks).items() if np.any(mask)}


@pytest.mark.parametrize(
    "encoding, freeze, names",
    [
        ("quadratic", "positions", {"centers", "spreads"}),
        ("quadratic", "values", {"value/kernel"}),
        ("gated", "both", {"centers", "spreads", "value/kernel"}),
        (
            "learned",
            "positions",
            {"row_embeddings", "column_embeddings", "row_head_keys/kernel", "column_head_keys/kernel"},
        ),
        ("learned_content", "positions", {"row_embeddings", "column_embeddings"}),
    ],
)
def test_positions_and_values_are_what_they_are_called(encoding, freeze, names):
    masks = frozen_names(encoding, freeze)
    assert set(masks) == {f"layer_{layer}/attention/{name}" for layer in (0, 1) for name in names}
    assert all(np.all(mask) for mask in masks.values())


def test_heads_that_were_reset_move():
    done = Surgery(((0, 2), (1,)), ((2,), ()))
    model = small_model("quadratic", heads=(2, 1))
    masks = flat(surgery.frozen(model, "both", done, lambda path: False))
    for name, shape in {"centers": (2, 1), "spreads": (2,), "value/kernel": (2, 1, 1)}.items():
        mask = masks[f"layer_0/attention/{name}"]
        assert mask.shape == shape and mask.reshape(-1).tolist() == [True, False]
        assert masks[f"layer_1/attention/{name}"].reshape(-1).tolist() == [True]


def test_what_starts_afresh_moves():
    masks = frozen_names("quadratic", "positions", fresh=("layer_0/attention/centers",))
    assert set(masks) == {"layer_0/attention/spreads", "layer_1/attention/centers", "layer_1/attention/spreads"}
