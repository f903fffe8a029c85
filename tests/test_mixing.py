"""Mixing computes the formula, the sum over heads and keys, in any form, in any blocks, within a device's memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from golden import assert_close, assert_trees_close
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_cnn import mixing
from attn_cnn.mixing import Blocks, Device, Factors, Fixed, Weighted, Whole, attend_in_blocks, choose_blocks

BATCH, HEADS, HEIGHT, WIDTH, FEATURES, OUT = 3, 4, 2, 3, 5, 4
X = jax.random.normal(jax.random.key(0), (BATCH, HEIGHT, WIDTH, FEATURES))
KERNEL = jax.random.normal(jax.random.key(1), (HEADS, FEATURES, OUT))


def of_keys(seed, *shape, axes):
    """Returns random probabilities, which sum to 1 over the last `axes` axes."""
    logits = jax.random.normal(jax.random.key(seed), (HEADS, *shape))
    return jax.nn.softmax(logits, tuple(range(-axes, 0)))


def attend(A, x, kernel):
    """Returns sum_h A_h x W_h as the formula reads."""
    return jnp.einsum("bhijkl,bkld,hdo->bijo", jnp.broadcast_to(A, (len(x), *A.shape[1:])), x, kernel)


def weighted(*parts):
    first = jnp.linspace(0.1, 0.9, HEADS)
    return Weighted((first, 1 - first), parts)


WHOLE = Whole(of_keys(2, HEIGHT, WIDTH, HEIGHT, WIDTH, axes=2))
FACTORS = Factors(of_keys(3, HEIGHT, 1, HEIGHT, axes=1), of_keys(4, 1, WIDTH, WIDTH, axes=1))
FACTORS_BY_QUERY = Factors(of_keys(5, HEIGHT, WIDTH, HEIGHT, axes=1), of_keys(6, HEIGHT, WIDTH, WIDTH, axes=1))
FORMS = {
    "whole": WHOLE,
    "factors": FACTORS,
    "factors by query": FACTORS_BY_QUERY,
    "weighted": weighted(WHOLE, FACTORS),
}
each_form = pytest.mark.parametrize("A", FORMS.values(), ids=FORMS.keys())


class ByImage(struct.PyTreeNode):
    """Heads whose numbers differ with the image and its index."""

    A: mixing.Probabilities

    def probabilities(self, image, index):
        return jax.tree.map(lambda a: a * (1 + 0.1 * index + 0.1 * jnp.tanh(image.mean())), self.A)


def entries(A):
    """Returns the probabilities entry by entry from the factors or parts of `A`, in float64."""
    if isinstance(A, Weighted):
        weights = [np.asarray(w, np.float64).reshape(-1, 1, 1, 1, 1) for w in A.weights]
        return sum(w * entries(part) for w, part in zip(weights, A.parts, strict=True))
    if isinstance(A, Whole):
        return np.asarray(A.values, np.float64)
    row = np.broadcast_to(A.row, (HEADS, HEIGHT, WIDTH, HEIGHT)).astype(np.float64)
    column = np.broadcast_to(A.column, (HEADS, HEIGHT, WIDTH, WIDTH)).astype(np.float64)
    return np.einsum("hijk,hijl->hijkl", row, column)


@each_form
def test_each_form_knows_its_entries_which_sum_to_1_over_the_keys(A):
    whole = A.whole().values
    np.testing.assert_allclose(whole, entries(A), rtol=1e-6)
    np.testing.assert_allclose(whole.sum((-2, -1)), 1, rtol=1e-6)


@each_form
def test_each_form_mixes_as_its_entries_do(A):
    expected = np.einsum("hijkl,kld->hijd", entries(A), np.asarray(X[0], np.float64))
    assert_close(A.mix(X[0]), expected)
    mixed = A.mix(X[0].astype(jnp.bfloat16))
    assert mixed.dtype == jnp.bfloat16
    assert_close(mixed.astype(jnp.float32), expected, tolerance=0.02)


@each_form
def test_what_is_dropped_is_dropped_wherever_the_form_is_used(A):
    keys = jax.random.split(jax.random.key(7), HEADS)
    dropped = jax.jit(A.drop, static_argnums=1)(keys, 0.5)
    before, after = entries(A), entries(dropped)
    np.testing.assert_allclose(after[after != 0], before[after != 0] / 0.5, rtol=1e-5)
    assert 0.2 < np.mean(after == 0) < 0.8
    assert_close(dropped.whole().values, after)
    assert_close(dropped.mix(X[0]), np.einsum("hijkl,kld->hijd", after, np.asarray(X[0], np.float64)))


def test_a_weighted_sum_drops_each_of_its_probabilities_as_a_whole_does():
    keys, A = jax.random.split(jax.random.key(8), HEADS), FORMS["weighted"]
    np.testing.assert_array_equal(A.drop(keys, 0.3).values, A.whole().drop(keys, 0.3).values)


def test_dropout_zeroes_at_its_rate_keeps_the_expectation_and_gives_each_head_its_own_mask():
    values = jnp.ones((2, 100, 100))
    dropped = mixing.drop(jax.random.split(jax.random.key(0), 2), 0.3, values)
    assert np.mean(dropped == 0) == pytest.approx(0.3, abs=0.01)
    assert np.mean(dropped) == pytest.approx(1, abs=0.02)
    assert np.mean((dropped[0] == 0) != (dropped[1] == 0)) == pytest.approx(2 * 0.3 * 0.7, abs=0.02)


def test_dropout_on_factors_drops_whole_rows_and_columns_at_the_same_rate():
    rate, side = 0.3, 40
    factors = Factors(jnp.ones((1, side, 1, side)), jnp.ones((1, 1, side, side)))
    product = factors.drop(jax.random.key(0)[None], rate).whole().values
    assert np.mean(product == 0) == pytest.approx(rate, abs=0.02)
    np.testing.assert_allclose(product[product > 0], 1 / (1 - rate), rtol=1e-5)
    assert np.mean(product) == pytest.approx(1, abs=0.03)  # the expectation is unchanged
    by_query = np.asarray(product[0]).reshape(side**2, side, side) == 0
    np.testing.assert_array_equal(by_query, by_query.all(2, keepdims=True) | by_query.all(1, keepdims=True))


def assert_blocks_compute_the_formula(heads, needs_x, all_blocks):
    def in_blocks(blocks, heads, x, kernel):
        return attend_in_blocks(heads, x, kernel, blocks, needs_x)

    def formula(heads, x, kernel):
        A = jnp.stack([heads.probabilities(image, i).whole().values for i, image in enumerate(x)])
        return attend(A if needs_x else A[:1], x, kernel)

    def values_and_gradients(compute):
        def loss(*args):
            y = compute(*args)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(heads, X, KERNEL)

    expected = values_and_gradients(formula)
    for blocks in all_blocks:
        assert_trees_close(values_and_gradients(functools.partial(in_blocks, blocks)), expected)


@pytest.mark.parametrize("form, needs_x", [("factors", False), ("whole", False), ("weighted", True)])
def test_blocks_compute_the_formula_and_its_gradients(form, needs_x):
    A = FORMS[form]
    assert_blocks_compute_the_formula(ByImage(A) if needs_x else Fixed(A), needs_x, [Blocks(2, 1, 2)])


ANY_BLOCKS = [
    Blocks(1, 1, 1),
    Blocks(2, 2, BATCH),
    Blocks(4, 1, 3),
    Blocks(4, 2, 1),
    Blocks(4, 4, 2),
    Blocks(4, 4, 9, False),
]


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("needs_x", [False, True])
def test_any_blocks_compute_the_formula_and_its_gradients(A, needs_x):
    assert_blocks_compute_the_formula(ByImage(A) if needs_x else Fixed(A), needs_x, ANY_BLOCKS)


def test_the_formula_is_the_sum_over_heads_and_keys():
    A, x, kernel = (np.asarray(a, np.float64) for a in (WHOLE.values, X, KERNEL))
    b, i, j = 1, 1, 2
    pixels = itertools.product(range(HEIGHT), range(WIDTH))
    expected = sum(A[h, i, j, k, l] * x[b, k, l] @ kernel[h] for (k, l), h in itertools.product(pixels, range(HEADS)))
    np.testing.assert_allclose(attend(WHOLE.values[None], X, KERNEL)[b, i, j], expected, rtol=1e-5)


LAYERS = {
    "batch": st.integers(1, 512),
    "heads": st.integers(1, 64),
    "pixels": st.integers(1, 2048),
    "features": st.integers(1, 1024),
    "needs_x": st.booleans(),
    "whole": st.booleans(),
}


def held(blocks, pixels, features, needs_x):
    """Returns how many values one block mixes or, where they differ from image to image, has as probabilities."""
    return blocks.heads * blocks.images * pixels * (max(features, pixels) if needs_x else features)


@given(**LAYERS)
def test_on_a_cpu_blocks_stay_in_its_caches_and_divide_the_heads(batch, heads, pixels, features, needs_x, whole):
    blocks = choose_blocks(batch, heads, pixels, features, needs_x=needs_x, whole=whole, device=Device("cpu", 2**36))
    assert heads % blocks.held == 0 and blocks.held % blocks.heads == 0 and 1 <= blocks.images <= batch
    smallest = blocks.heads == blocks.images == 1
    assert smallest or held(blocks, pixels, features, needs_x) <= mixing.CPU_BLOCK
    if whole and not needs_x:
        assert blocks.held == 1 or blocks.held * pixels**2 <= mixing.CPU_BLOCK


@given(**LAYERS)
def test_an_unbounded_device_does_everything_at_once(batch, heads, pixels, features, needs_x, whole):
    blocks = choose_blocks(batch, heads, pixels, features, needs_x=needs_x, whole=whole, device=mixing.UNBOUNDED)
    assert blocks == Blocks(heads, heads, batch)


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
@settings(max_examples=50)
@given(**LAYERS, log_memory=st.integers(24, 36), factor=st.integers(2, 16))
def test_an_accelerators_block_takes_a_sixteenth_of_its_memory_and_grows_with_it(
    kind, log_memory, factor, batch, heads, pixels, features, needs_x, whole
):
    def blocks_in(memory):
        device = Device(kind, memory)
        return choose_blocks(batch, heads, pixels, features, needs_x=needs_x, whole=whole, device=device)

    memory = 2**log_memory
    less, more = blocks_in(memory), blocks_in(memory * factor)
    assert all(few <= many for few, many in zip(less[:3], more[:3], strict=True)) and less.recompute >= more.recompute
    smallest = less.heads == less.images == 1
    assert smallest or 4 * held(less, pixels, features, needs_x) <= memory / 16


def test_a_larger_accelerator_takes_more_heads_then_more_images_at_once_and_then_keeps_what_it_mixed():
    def blocks_in(memory):
        return choose_blocks(64, 8, 256, 64, needs_x=True, whole=True, device=Device("gpu", memory))

    assert [blocks_in(2**power) for power in (22, 24, 25, 28, 32, 34)] == [
        Blocks(8, 1, 1),
        Blocks(8, 4, 1),
        Blocks(8, 8, 1),
        Blocks(8, 8, 8),
        Blocks(8, 8, 64),
        Blocks(8, 8, 64, recompute=False),
    ]


def test_an_accelerator_that_keeps_its_memory_to_itself_counts_as_a_small_one():
    layer = {"batch": 256, "heads": 9, "pixels": 1024, "features": 400, "needs_x": True, "whole": True}
    unknown, small, large = (choose_blocks(**layer, device=Device("gpu", memory)) for memory in (0, 2**33, 2**36))
    assert unknown == small != large


@pytest.mark.parametrize("device", [Device("cpu"), Device("gpu", 2**36), mixing.UNBOUNDED])
def test_a_batch_of_symbolic_size_goes_image_by_image(device):
    (batch,) = jax.export.symbolic_shape("b")
    blocks = choose_blocks(batch, 4, 16, 8, needs_x=False, whole=False, device=device)
    assert blocks == Blocks(4, 4, 1)


def test_this_device_is_the_one_jax_computes_on():
    assert mixing.this_device().kind == jax.default_backend()
