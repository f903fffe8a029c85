"""An encoding of one's own is one class: it factors, is mapped and counted, and takes the options of those built in."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import Golden, assert_close, small_model
from jaxtyping import Array

import attn_cnn
from attn_cnn import mixing, train
from attn_cnn.attention import attention_maps
from attn_cnn.encodings import ENCODINGS, CenteredEncoding, along_heads, centers_init, encoding_class, spreads_init
from attn_cnn.errors import UserError
from attn_cnn.heads import history, measure, surgery
from attn_cnn.model import abstract_variables, create_model
from configs import quadratic


class Manhattan(CenteredEncoding, name="manhattan"):
    """Scores -s_h |d - mu_h|_1."""

    centers: Array  # heads 2
    spreads: Array  # heads

    separable = True

    @classmethod
    def declare(cls, module, features, tables):
        return cls(
            module.param("centers", centers_init(module), (module.heads, 2)),
            module.param("spreads", spreads_init(module, jnp.ones(())), (module.heads,)),
        )

    def terms(self, rows, columns, x=None):
        def term(shifts, center):
            return -along_heads(self.spreads, shifts) * jnp.abs(shifts - along_heads(center, shifts))

        return term(rows, self.centers[:, 0]), term(columns, self.centers[:, 1])


# Other test files look through all encodings, so this one is among them only while a test of this file runs.
del ENCODINGS["manhattan"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ENCODINGS, "manhattan", Manhattan)


@functools.cache
def start():
    """Returns images and the parameters of a small model."""
    images = Golden("quadratic").images
    return images, jax.jit(create_model(small_model("manhattan", layers=1)).init)(jax.random.key(0), images)["params"]


def test_a_class_is_found_by_its_name_once_it_is_defined():
    with pytest.raises(UserError, match="'chebyshev'"):
        encoding_class("chebyshev")

    class Chebyshev(Manhattan, name="chebyshev"):
        """Another one."""

    try:
        assert encoding_class("chebyshev") is Chebyshev and Chebyshev.name == "chebyshev"
    finally:
        del ENCODINGS["chebyshev"]


@pytest.mark.slow
def test_its_factored_form_is_its_dense_form(monkeypatch):
    images, params = start()
    calls, mix = [], mixing.Factors.mix
    monkeypatch.setattr(mixing.Factors, "mix", lambda *args: (calls.append("factors"), mix(*args))[1])

    def logits(form):
        calls.clear()
        return jax.jit(create_model(small_model("manhattan", layers=1, mixing=form)).apply)({"params": params}, images)

    dense = logits("dense")
    assert not calls
    assert_close(logits("auto"), dense)
    assert calls


@pytest.mark.slow
def test_its_maps_are_its_formula():
    images, params = start()
    model = create_model(small_model("manhattan", layers=1))
    (ours,) = jax.jit(functools.partial(attention_maps, model))(params, images)
    centers, spreads = reference.float64(*(params["layer_0"]["attention"][name] for name in ("centers", "spreads")))
    distances = np.abs(reference.shifts(6, 6) - centers[:, None, None, None, None]).sum(-1)
    assert_close(ours[0], reference.softmax(-spreads[:, None, None, None, None] * distances))


def test_it_has_the_parameters_that_it_declares():
    ours, quadratic = (abstract_variables(small_model(name)) for name in ("manhattan", "quadratic"))
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, quadratic)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "grid", "init_spread": 0.5, "heads": (9, 0)},
        {"mixing": "factored", "attention_dropout": 0.1, "attention_dropout_on": "factors"},
        {"mixing": "dense", "attention_dropout": 0.1},
        {"layer": ("convolution", "attention")},
    ],
)
def test_it_takes_the_options_of_a_built_in_encoding(options):
    abstract_variables(small_model("manhattan", **options))


def test_none_of_its_heads_is_pruned_or_drawn_as_a_gaussian():
    heads = Manhattan(jnp.zeros((2, 2)), jnp.zeros(2))
    assert heads.degenerate() == {}
    assert heads.gaussians() is None


@pytest.mark.slow
def test_its_heads_have_numbers_and_are_replayed_from_them():
    images, params = start()
    model = create_model(small_model("manhattan", layers=1))
    by_layer = jax.jit(functools.partial(measure.measure, model))(params, images)
    numbers = history.appended({}, {"epoch": 1, "step": 1, **measure.stacked(by_layer, 1)})
    assert np.isfinite(numbers["nonlocality"]).all() and "center" not in numbers
    (ours,) = jax.jit(functools.partial(attention_maps, model))(params, images)
    assert_close(history.replay(numbers, 0, 0), ours[0], tolerance=3e-3)  # row and column scores are in float16


@pytest.mark.slow
def test_its_heads_can_be_pruned():
    model, (_, params) = small_model("manhattan", layers=1), start()
    pruned = surgery.prune(params, model, {0: {0}})["layer_0"]["attention"]
    np.testing.assert_array_equal(pruned["centers"], params["layer_0"]["attention"]["centers"][1:])


@pytest.mark.slow
def test_it_trains_is_saved_resumes_and_is_opened_again(tmp_path):
    config = quadratic.get_config("digits")
    config.epochs, config.checkpoint.every_epochs = 2, 1
    config.model.update(encoding="manhattan", layers=1, hidden_size=16, mlp_size=16)
    state = train.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "28")
    resumed = train.train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)
    run = attn_cnn.load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, run.params, state.params)
    assert run.config.model.encoding == "manhattan"
