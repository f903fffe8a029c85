"""What the page knows of a run beside its network: images, predictions, the heads of each layer, and their history.

A view is plain dicts and lists with NumPy arrays in them; `page.pack` writes it, `static/mathematics.js` reads it.

    name, about                   to read
    step                          of the checkpoint
    classes, mean, std            as `load_run` has them
    images, labels                of the first test images, uint8 (images, height, width, channels)
    probabilities                 of the classes for each image, as --mode=predict computes them
    layers, one for each layer that has attention:
        name, number              to read; its place among all layers, which the history counts
        grid, padding             rows and columns of pixels; zeros around them, which are attended to as well
        parameters                what scores need: `encoding`, its name, and its arrays
        features                  what the layer sees of each image, (images, H, W, features), where scores depend on it
        gram                      <W_h, W_g>, the products of the value maps: energies of kernels follow from it
    history                       of the heads, by epoch; arrays as `heads.npz` documents them

A view of attention maps alone has `name`, `about`, `layers` and, where they are known, `images`.

An encoding is written by its name where the page can compute its scores, which is so for the project's own. Of another
one, the page gets the scores by shift (`by_shift`) or, where these depend on the image, maps in 8 bits (`maps`).
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Shaped

from attn_cnn import predict
from attn_cnn.attention import heads_of_layers
from attn_cnn.encodings import Encoding, Quadratic
from attn_cnn.errors import UserError
from attn_cnn.explorer.network import Step
from attn_cnn.heads import history as history_lib
from attn_cnn.heads import measure
from attn_cnn.maps import Maps
from attn_cnn.model import has_heads
from attn_cnn.training import augment, data
from attn_cnn.training.experiment import precision_of
from attn_cnn.training.runs import Run, load_config, load_run
from attn_cnn.training.workdir import CHECKPOINTS

log = logging.getLogger("attn_cnn")

# Encodings whose scores static/mathematics.js computes.
KNOWN = (
    "quadratic",
    "quadratic_generalized",
    "learned",
    "learned_query",
    "learned_content",
    "learned_content_position",
    "gated",
)
EPOCHS = 100  # that a history is thinned to

View = dict[str, Any]


def of_run(run: Run, name: str, images: int, steps: list[Step], half: bool) -> View:
    """Returns the view of a run with its first `images` test images.

    Args:
      run: the run.
      name: what to call it.
      images: number of images.
      steps: the steps of its network.
      half: whether large arrays are written in half precision.

    Raises:
      UserError: the run's data cannot be read.
    """
    dataset = data.load_with_test_set(run.config.data)
    shown = dataset.test_images[:images]
    normalised = augment.normalize(shown, run.mean, run.std)
    return {
        "name": name,
        "about": about(run),
        "step": run.step,
        "classes": list(run.spec.names),
        "mean": list(run.mean),
        "std": list(run.std),
        "images": shown,
        "labels": dataset.test_labels[:images].tolist(),
        "probabilities": predict.predict(run, shown),
        "layers": layers(run, normalised, steps, half),
    }


def about(run: Run) -> str:
    """Returns a line on a run's model and data."""
    model = run.config.model
    if model.name == "resnet18":
        what = f"ResNet-18, width {model.width}"
    else:
        what = f"{model.encoding.replace('_', ' ')} encoding, {model.layers} layers"
    return f"{what}, {run.config.data.name.rpartition('/')[2]}, step {run.step:,}"


def of_maps(name: str, maps: Maps, images: int) -> View:
    """Returns the view of the attention maps of any transformer, of its first `images` images."""
    maps = Maps([layer[:images] for layer in maps.layers], None if maps.images is None else maps.images[:images])
    of_layers = [
        {
            "name": f"Layer {number}",
            "number": number,
            "grid": list(layer.shape[2:4]),
            "padding": 0,
            "parameters": in_8_bits(layer),
        }
        for number, layer in enumerate(maps.layers)
    ]
    view = {"name": name, "about": f"{len(maps.layers)} layers of maps", "layers": of_layers}
    return view if maps.images is None else view | {"images": maps.images}


def in_8_bits(maps: Shaped[np.ndarray, "images heads H W H W"]) -> dict[str, Any]:
    """Returns maps as multiples of 1/255 of each query's largest probability."""
    images, heads, height, width, *_ = maps.shape
    flat = np.asarray(maps, np.float32).reshape(images, heads, height * width, height * width)
    largest = flat.max(-1)
    return {
        "encoding": "maps",
        "maps": np.round(255 * flat / largest[..., None]).astype(np.uint8),
        "largest": largest,
    }


def layers(run: Run, images: Float[jax.Array, "_ height width channels"], steps: list[Step], half: bool) -> list[View]:
    """Returns what the page knows of each layer that has attention."""
    attention = [step for step in steps if step["op"] == "attention" and "layer" in step]
    if run.config.model.name == "resnet18":
        found = list(_expressed_layers(run, steps))
    else:
        with precision_of(run.config):
            heads = jax.jit(functools.partial(heads_of_layers, run.model))(run.params, images)
            found = [_layer(number, layer.encoding, layer.x, half) for number, layer in heads.items()]
    for layer, step in zip(found, attention, strict=True):
        value = step["value"].reshape(len(step["value"]), -1)
        layer["gram"] = value @ value.T
    return found


def _layer(number: int, encoding: Encoding, x: Float[jax.Array, "_ H W features"], half: bool) -> View:
    height, width = x.shape[1:3]
    layer = {"name": f"Layer {number}", "number": number, "grid": [height, width], "padding": 0}
    if encoding.name in KNOWN:
        layer["parameters"] = {"encoding": encoding.name, **flax.serialization.to_state_dict(encoding)}
        if encoding.needs_x:
            layer["features"] = np.asarray(x)
            if half:
                layer = jax.tree.map(lambda a: np.asarray(a, np.float16) if np.size(a) > 10_000 else a, layer)
        return layer
    if encoding.needs_x:
        maps = jax.lax.map(lambda image: encoding.probabilities(image).whole().values, x)
        return layer | {"parameters": in_8_bits(np.asarray(maps))}
    rows, columns = jnp.arange(1 - height, height), jnp.arange(1 - width, width)
    scores = encoding.scores(rows[:, None], columns[None])
    return layer | {"parameters": {"encoding": "by_shift", "scores": np.asarray(scores)}}


def _expressed_layers(run: Run, steps: list[Step]) -> Iterator[View]:
    """Yields the attention layers that stand in a ResNet for convolutions; a stride halves the grid of what follows."""
    height, width, _ = run.config.model.image_shape
    for step in steps:
        if step["op"] == "attention":
            layer = functools.reduce(dict.__getitem__, step["path"].split("/"), run.params)
            parameters = {"encoding": Quadratic.name, "centers": layer["centers"], "spreads": layer["spreads"]}
            grid = {"grid": [height, width], "padding": step["padding"]}
            yield {"name": step["path"], "number": -1, **grid, "parameters": parameters}
        if step["op"] in ("attention", "convolution"):
            height, width = (-(-side // step["stride"]) for side in (height, width))


def history(workdir: epath.Path) -> dict[str, np.ndarray] | None:
    """Returns what moved while the run in `workdir` trained, thinned to `EPOCHS`: from heads.npz, or its checkpoints.

    Raises:
      UserError: the file of numbers is damaged.
    """
    if not (workdir / history_lib.NAME).exists():
        return trail(workdir)
    numbers = history_lib.read(workdir)
    choices = (("center", "precision", "gate"), ("row_scores", "column_scores"), ("mean_shift", "covariance"))
    names = next(names for names in choices if names[0] in numbers)
    kept = history_lib.evenly(len(numbers["epoch"]), EPOCHS)
    return {name: numbers[name][kept] for name in ("epoch", "step", *names) if name in numbers}


def trail(workdir: epath.Path) -> dict[str, np.ndarray] | None:
    """Returns centers and precisions of the heads at each checkpoint that can be read, where they are Gaussians."""
    if not has_heads(load_config(workdir).model):
        return None
    found = {}
    for step in sorted(int(path.name) for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdigit()):
        try:
            found[step] = _gaussians(load_run(workdir, step))
        except UserError as error:
            log.warning("The heads' history leaves out step %d: %s", step, error)
    if len(found) < 2 or any(heads is None for heads in found.values()):
        return None
    return {"step": np.array(list(found)), **jax.tree.map(lambda *heads: np.stack(heads), *found.values())}


def _gaussians(run: Run) -> dict[str, np.ndarray] | None:
    """Returns `center` and `precision` of a run's heads, as `stacked` has them, where all are Gaussians."""
    model = run.config.model
    with precision_of(run.config):
        encodings = measure.encodings(run.model, run.params, model.image_shape)
        gaussians = {number: found for number, encoding in encodings.items() if (found := encoding.gaussians())}
    if not encodings or len(gaussians) < len(encodings):
        return None
    return measure.stacked(
        {number: {"center": center, "precision": precision} for number, (center, precision) in gaussians.items()},
        model.layers,
    )
