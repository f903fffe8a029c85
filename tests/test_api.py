"""What people build on: the package's few names, and a layer that works in anybody's model."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import Golden, assert_close, small_model
from program import ROOT, readme_cell, tiny_config

import attn_cnn
from attn_cnn.encodings import ENCODINGS
from configs import quadratic


def test_completion_offers_the_names_that_matter_and_each_is_documented():
    assert dir(attn_cnn) == sorted(attn_cnn.__all__)
    for name in attn_cnn.__all__:
        assert name in attn_cnn.__doc__ and getattr(attn_cnn, name).__doc__


def test_the_layer_of_the_readme_returns_what_it_says():
    names = {}
    exec(readme_cell("SelfAttention"), names)
    assert names["y"].shape == names["x"].shape


@pytest.mark.slow
def test_the_run_of_the_readme_is_trained_and_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_scale = {"digits": tiny_config(epochs=1)}
    monkeypatch.setattr(quadratic, "get_config", of_scale.get)
    names = {}
    exec(readme_cell("load_run"), names)
    assert names["logits"].shape == (8, 10) and [layer.shape for layer in names["maps"]] == [(1, 9, 4, 4, 4, 4)]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'attn_cnn' has no attribute 'nothing'"):
        attn_cnn.nothing  # noqa: B018


def test_importing_the_package_imports_neither_jax_nor_tensorflow():
    said = subprocess.run(
        [sys.executable, "-c", "import sys, attn_cnn; print({'jax', 'flax', 'tensorflow'} & set(sys.modules))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "set()\n"


def test_a_model_and_its_maps_in_four_lines():
    images = Golden("quadratic").images
    model = attn_cnn.create_model(small_model("quadratic"))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    maps = attn_cnn.attention_maps(model, params, images)
    assert len(maps) == small_model("quadratic").layers
    np.testing.assert_allclose([layer.sum((-2, -1)) for layer in maps], 1, rtol=1e-5)


class Block(nn.Module):
    """A layer of one's own around the attention, as scans and rematerialisation take it."""

    encoding: str
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        layer = attn_cnn.SelfAttention(self.encoding, heads=2, max_side=5, dtype=self.dtype, name="attention")
        return nn.LayerNorm(name="norm")(x + layer(x)), None


def some_grids(features=6):
    return jax.random.normal(jax.random.key(0), (2, 3, 5, features))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["quadratic", "learned_query", "gated"])  # with factors, by query, and both
def test_a_scan_over_layers_with_rematerialisation_is_those_layers_in_a_row(encoding):
    scanned = nn.scan(nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=3)(encoding)
    x = some_grids()
    params = jax.jit(scanned.init)(jax.random.key(1), x, None)["params"]

    def in_a_row(params, x):
        for n in range(3):
            x, _ = Block(encoding).apply({"params": jax.tree.map(lambda a, n=n: a[n], params)}, x)
        return jnp.sin(x).sum()

    def by_scan(params, x):
        return jnp.sin(scanned.apply({"params": params}, x, None)[0]).sum()

    ours, expected = (jax.jit(jax.value_and_grad(f))(params, x) for f in (by_scan, in_a_row))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_layer_in_bfloat16_is_near_the_one_in_float32(encoding):
    x = some_grids()
    params = jax.jit(Block(encoding).init)(jax.random.key(1), x)
    exact, rounded = (jax.jit(Block(encoding, dtype).apply)(params, x)[0] for dtype in (jnp.float32, jnp.bfloat16))
    assert_close(rounded.astype(jnp.float32), exact, tolerance=0.02)


def test_maps_are_taken_inside_a_training_loop_of_ones_own():
    x = some_grids()
    params = jax.jit(Block("gated").init)(jax.random.key(1), x)["params"]

    @jax.jit
    def step(params):
        def loss(params):
            (y, _), seen = Block("gated").apply({"params": params}, x, mutable=["intermediates"])
            return jnp.square(y - 1).mean(), seen["intermediates"]["attention"]["probabilities"][0]

        (value, maps), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value, maps

    losses = []
    for _ in range(3):
        params, value, maps = step(params)
        losses.append(value)
    assert maps.shape == (2, 2, 3, 5, 3, 5) and losses[2] < losses[0]
    np.testing.assert_allclose(maps.sum((-2, -1)), 1, rtol=1e-5)
