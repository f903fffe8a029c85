"""The page's own functions compute what attn_cnn computes: attention maps, logits, energies; to 1e-4."""

import functools

import browser
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import pytest
from etils import epath
from golden import ENCODINGS, Golden, small_model

from attn_cnn.attention import attention_maps
from attn_cnn.encodings import ENCODINGS as CLASSES
from attn_cnn.encodings import Encoding, along_heads
from attn_cnn.explorer import network, page, view
from attn_cnn.model import create_model
from attn_cnn.torch_import import import_state_dict
from attn_cnn.training import pictures
from attn_cnn.training.dataset import Spec
from attn_cnn.training.runs import Run
from configs import resnet18

pytestmark = browser.needed
TOLERANCE = 1e-4


def run_of(model, params, batch_stats=None):
    config, channels = ml_collections.ConfigDict({"model": model, "matmul_precision": "default"}), model.image_shape[-1]
    mean, std = (0.0,) * channels, (1.0,) * channels
    spec = Spec(tuple(model.image_shape), mean, std, 1, tuple(str(n) for n in range(model.classes)))
    return Run(create_model(model), params, batch_stats or {}, config, mean, std, 0, spec)


def golden_run(encoding):
    golden = Golden(encoding)
    model = golden.model()
    return run_of(model, import_state_dict(golden.state_dict(), model)), golden.images


def random_run(model):
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.normal(size=(2, *model.image_shape)), jnp.float32)
    variables = jax.jit(create_model(model).init)(jax.random.key(0), images)
    moved = jax.tree.map(lambda a: a + 0.1 * np.abs(draw.normal(size=a.shape)).astype(np.float32), variables)
    return run_of(model, moved["params"], moved.get("batch_stats")), images


CHANGES = {
    "gated": {},
    "learned_content": {"share_tables": True},
    "quadratic": {"layer": ("convolution", "attention"), "heads": (3, 2)},
    "learned": {"heads": (0, 3)},
    "quadratic_generalized": {"image_shape": (16, 16, 3), "merge_before": (1,), "hidden_size": (8, 12)},
    "learned_query": {"layer": ("attention", "convolution"), "kernel_size": 2},
}
MODELS = [pytest.param(functools.partial(golden_run, encoding), id=encoding) for encoding in ENCODINGS] + [
    pytest.param(
        lambda encoding=encoding, changes=changes: random_run(small_model(encoding, **changes)),
        id=f"{encoding} {changes}",
    )
    for encoding, changes in CHANGES.items()
]


@pytest.fixture
def open_run(chromium, tmp_path):
    """Opens the page of a run and normalised images, with the whole network in it."""

    def opened(run, images):
        steps = network.steps(run)
        shown = {
            "name": "run",
            "about": "",
            "step": 0,
            "classes": list(run.spec.names),
            "mean": list(run.mean),
            "std": list(run.std),
            "images": np.zeros(images.shape, np.uint8),
            "labels": [0] * len(images),
            "probabilities": np.zeros((len(images), run.config.model.classes), np.float32),
            "layers": view.layers(run, images, steps, half=False),
        }
        return browser.opened(chromium, browser.written(tmp_path, page.build([shown], [steps])))

    return opened


def logits_in(opened, images):
    return opened.evaluate(
        """images => images.map(({data, shape: [height, width, features]}) =>
             Array.from(finish(runNetwork(networks[0], views[0].layers,
               {data: Float32Array.from(data), height, width, features})).logits))""",
        [{"data": np.asarray(image).ravel().tolist(), "shape": image.shape} for image in images],
    )


MAP = """([layer, head, query, image]) => {
  const {parameters, grid, features} = views[0].layers[layer];
  const size = features ? features.length / features.shape[0] : 0;
  const x = features && features.subarray(image * size, (image + 1) * size);
  return Array.from(probabilities(parameters, head, query, grid, {x, image}));
}"""


@pytest.mark.parametrize("make", MODELS)
def test_maps_and_logits_are_those_of_the_model(make, open_run):
    run, images = make()
    expected, maps = jax.jit(
        lambda params: (run.model.apply({"params": params}, images), attention_maps(run.model, params, images))
    )(run.params)
    with open_run(run, images) as opened:
        logits = logits_in(opened, images)
        drawn = np.random.default_rng(0)
        for _ in range(40):
            layer = drawn.integers(len(maps))
            _, heads, height, width, *_ = maps[layer].shape
            head, i, j, image = (int(drawn.integers(n)) for n in (heads, height, width, len(images)))
            ours = opened.evaluate(MAP, [int(layer), head, [i, j], image])
            theirs = maps[layer][min(image, len(maps[layer]) - 1), head, i, j].ravel()
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize("layer", ["convolution", "attention"])
def test_a_resnets_logits_are_those_of_the_model(layer, open_run):
    model = resnet18.get_config("digits").model
    model.width, model.layer = 4, layer
    run, images = random_run(model)
    expected = jax.jit(run.model.apply)({"params": run.params, "batch_stats": run.batch_stats}, images)
    with open_run(run, images) as opened:
        np.testing.assert_allclose(logits_in(opened, images), expected, atol=TOLERANCE, rtol=TOLERANCE)


def own_encoding(name, needs_x):
    class Own(Encoding, name=name):
        strength: jax.Array  # heads

        @classmethod
        def declare(cls, module, features, tables):
            return cls(module.param("strength", jax.nn.initializers.normal(1.0), (module.heads,)))

        def scores(self, rows, columns, x=None):
            seen = x.mean(-1) if needs_x else 0  # of the keys
            return along_heads(self.strength, rows) * ((rows * columns) % 3 + seen)

    Own.needs_x = needs_x
    return Own


@pytest.fixture
def encoding(request):
    own_encoding(request.param, request.param == "own_content")
    yield request.param
    del CLASSES[request.param]


@pytest.mark.parametrize(
    "encoding, tolerance", [("own_position", 1e-4), ("own_content", 1 / 255)], indirect=["encoding"]
)
def test_encodings_that_the_page_does_not_know_come_as_scores_by_shift_or_as_maps(encoding, tolerance, open_run):
    run, images = random_run(small_model(encoding))
    maps = attention_maps(run.model, run.params, images)
    with open_run(run, images) as opened:
        for image in range(2):
            ours = opened.evaluate(MAP, [1, 0, [2, 1], image])
            theirs = maps[1][min(image, len(maps[1]) - 1), 0, 2, 1].ravel()
            np.testing.assert_allclose(ours, theirs, atol=tolerance)


def test_energies_are_the_squares_of_the_layers_kernel(open_run):
    run, images = golden_run("quadratic")
    params = run.params["layer_0"]
    value = params["attention"]["value"]["kernel"] @ params["attention_output"]["kernel"]
    A = attention_maps(run.model, run.params, images)[0][0, :, 1, 2]
    kernel = np.einsum("hkl,hdo->kldo", A, value)
    with open_run(run, images) as opened:
        ours = opened.evaluate(
            """() => { const {parameters, grid, gram} = views[0].layers[0];
              const P = Array.from({length: headsOf(parameters)}, (_, h) => probabilities(parameters, h, [1, 2], grid));
              return Array.from(energies(P, gram)); }"""
        )
        sharp, soft = opened.evaluate(
            """() => [1e6, 1].map(sharpness => { const {parameters, grid, gram} = views[0].layers[0];
              const P = Array.from({length: headsOf(parameters)},
                (_, h) => probabilities(parameters, h, [1, 2], grid, {sharpness}));
              return distanceToTaps(P, gram); })"""
        )
    np.testing.assert_allclose(ours, (kernel**2).sum((2, 3)).ravel(), rtol=1e-4)
    assert sharp < 1e-3 < soft


def test_pictures_are_resized_as_pillow_does(open_run, tmp_path):
    run, images = golden_run("quadratic")
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "picture.png")
    rgba = np.concatenate([pixels, np.full((37, 50, 1), 255, np.uint8)], -1)
    with open_run(run, images) as opened:
        for shape in ((8, 8, 3), (32, 32, 1), (64, 100, 3)):
            ours = opened.evaluate(
                "([data, shape]) => Array.from(fitted({data, width: 50, height: 37}, shape))",
                [rgba.ravel().tolist(), shape],
            )
            theirs = pictures.read(epath.Path(tmp_path) / "picture.png", shape).ravel().astype(int)
            assert np.abs(np.array(ours) - theirs).max() <= 1


def test_half_precision_is_read_as_numpy_writes_it(open_run):
    run, images = golden_run("quadratic")
    bits = np.arange(65536, dtype=np.uint16)
    finite = np.isfinite(bits.view(np.float16))
    with open_run(run, images) as opened:
        ours = opened.evaluate("bits => Array.from(fromHalf(Uint16Array.from(bits)))", bits[finite].tolist())
    np.testing.assert_array_equal(ours, bits.view(np.float16)[finite].astype(np.float32))
