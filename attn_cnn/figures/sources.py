"""What figures are drawn of: a run, or attention maps from a file; both answer the same questions.

Query pixels are given in the first layer's grid; in a coarser layer, that pixel counts which covers the same place.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from attn_cnn import paths
from attn_cnn.attention import LayerHeads, attention_maps, heads_of_layers
from attn_cnn.encodings import Parts, encoding_class
from attn_cnn.errors import UserError
from attn_cnn.heads import measure, views
from attn_cnn.heads.views import LayerView
from attn_cnn.maps import Maps
from attn_cnn.model import has_heads
from attn_cnn.training import augment, data, pictures
from attn_cnn.training.experiment import precision_of
from attn_cnn.training.runs import Run

Query = tuple[int, int]
Image = UInt8[np.ndarray, "height width channels"]
Images = UInt8[np.ndarray, "images height width channels"]
Numbers = dict[int, Mapping[str, np.ndarray]]  # of each layer's heads, as `heads/history.py` documents them

BATCH = 10  # images whose maps are computed at once


class Seen(NamedTuple):
    """What the heads of one layer see from some query pixels.

    Attributes:
      probabilities: of one image where they are the same for all.
      queries: the query pixels in this layer's grid.
    """

    probabilities: Float[np.ndarray, "_ queries heads H W"]
    queries: Sequence[Query]


class RunSource:
    """A run, and the first images of its test set, which are read where they are needed.

    Attributes:
      run: the run.
      needs_x: whether the maps depend on the image.
      grid: rows and columns of the grid in which queries are given.
    """

    def __init__(self, run: Run, number: int):
        """Raises UserError if the run has no heads; maps are averaged over the first `number` images."""
        if not has_heads(run.config.model):
            raise UserError(
                f"the run is of a {run.config.model.name} model without heads, which has no attention to draw."
            )
        self.run, self._number = run, number
        self.needs_x = encoding_class(run.config.model.encoding).needs_x
        self._grids = {number: layer.grid for number, layer in self._layers.items()}
        self.grid = next(iter(self._grids.values()))

    @property
    def images(self) -> Images:
        """The images that maps are averaged over."""
        return self._test_images[: self._number]

    def image(self, which: str) -> Image:
        """Returns the image of a number in the test set, or of a picture's path.

        Raises:
          UserError: there is none.
        """
        if not which.isdigit():
            return pictures.read(paths.resolve(which, "--image"), self.run.spec.image_shape)
        _check_number(int(which), len(self._test_images))
        return self._test_images[int(which)]

    def of_image(self, which: str, queries: Sequence[Query]) -> dict[int, Seen]:
        """Returns what the heads see from the query pixels of one image, by the layer's number."""
        return self._seen(self.image(which)[None] if self.needs_x else self._blank, queries)

    def average(self, queries: Sequence[Query]) -> dict[int, Seen]:
        """Returns what the heads see from the query pixels of each of the images, by the layer's number."""
        return self._seen(self.images if self.needs_x else self._blank, queries)

    def _seen(self, images: Images, queries: Sequence[Query]) -> dict[int, Seen]:
        own = {number: [in_grid(query, self.grid, grid) for query in queries] for number, grid in self._grids.items()}

        @jax.jit
        def of_batch(params, x):
            maps = attention_maps(self.run.model, params, x)
            places = (tuple(np.array(of_layer).T) for of_layer in own.values())
            return [jnp.moveaxis(layer[:, :, *at], 2, 1) for layer, at in zip(maps, places, strict=True)]

        batches = [self._apply(of_batch, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        layers = [np.concatenate(layer) for layer in zip(*batches, strict=True)]
        return {number: Seen(layer, own[number]) for number, layer in zip(own, layers, strict=True)}

    def views(self, query: Query) -> dict[int, LayerView]:
        """Returns the layers as seen from a query pixel, averaged over the images where they count."""
        seen = functools.cache(lambda: self.average([query]))
        queries = {number: in_grid(query, self.grid, grid) for number, grid in self._grids.items()}
        return views.of_layers(self._layers, queries, lambda number: seen()[number].probabilities[:, 0].mean(0))

    def numbers(self) -> Numbers:
        """Returns what each layer's heads do."""
        images = self.images[: measure.IMAGES] if self.needs_x else self._blank
        return jax.device_get(self._apply(jax.jit(functools.partial(measure.measure, self.run.model)), images))

    def parts(self, image: Image, query: Query) -> dict[int, tuple[Parts, Query]]:
        """Returns the scores before softmax from a query pixel, each (heads, H, W), by the layer's number.

        Beside them stands the query pixel in that layer's grid.
        """
        own = {number: in_grid(query, self.grid, grid) for number, grid in self._grids.items()}

        def of_image(params, x):
            layers = zip(attention_maps(self.run.model, params, x, parts=True), own.values(), strict=True)
            return [jax.tree.map(lambda scores, at=at: scores[0, :, *at], layer) for layer, at in layers]

        parts = jax.device_get(self._apply(jax.jit(of_image), image[None]))
        return {number: (layer, own[number]) for number, layer in zip(own, parts, strict=True)}

    @functools.cached_property
    def _test_images(self) -> Images:
        return data.load_with_test_set(self.run.config.data).test_images

    @functools.cached_property
    def _blank(self) -> Images:
        return np.zeros((1, *self.run.config.model.image_shape), np.uint8)

    @functools.cached_property
    def _layers(self) -> dict[int, LayerHeads]:
        return self._apply(jax.jit(functools.partial(heads_of_layers, self.run.model)), self._blank)

    def _apply(self, function: Callable[[dict, jax.Array], Any], images: Images) -> Any:
        run = self.run
        with precision_of(run.config):
            return function(run.params, augment.normalize(images, run.mean, run.std))


class FileSource:
    """Attention maps from a file, averaged over the first images in it.

    Attributes:
      needs_x: whether there are maps of more than one image.
      images: the images that the maps are of; None: they are not in the file.
      grid: rows and columns of the grid in which queries are given.
    """

    def __init__(self, maps: Maps, number: int):
        self._layers, self._number = maps.layers, number
        self.images = maps.images
        self.needs_x = any(len(layer) > 1 for layer in self._layers)
        self.grid = self._layers[0].shape[2:4]

    def image(self, which: str) -> Image | None:
        """Returns the image of a number, or None where the file has no images.

        Raises:
          UserError: it has no such image.
        """
        if not which.isdigit():
            raise UserError(f"--image is {which!r}, but the maps of a file are of its own images; give a number.")
        count = max(map(len, self._layers))
        _check_number(int(which), count if self.needs_x else len(self.images) if self.images is not None else 1)
        return None if self.images is None else self.images[int(which)]

    def of_image(self, which: str, queries: Sequence[Query]) -> dict[int, Seen]:
        """Returns what the heads see from the query pixels of one image, by the layer's number."""
        return self._seen([layer if len(layer) == 1 else layer[int(which)][None] for layer in self._layers], queries)

    def average(self, queries: Sequence[Query]) -> dict[int, Seen]:
        """Returns what the heads see from the query pixels of each of the images, by the layer's number."""
        return self._seen([layer[: self._number] for layer in self._layers], queries)

    def _seen(self, layers: Sequence[np.ndarray], queries: Sequence[Query]) -> dict[int, Seen]:
        result = {}
        for number, layer in enumerate(layers):
            own = [in_grid(query, self.grid, layer.shape[2:4]) for query in queries]
            rows, columns = np.array(own).T
            result[number] = Seen(np.moveaxis(layer[:, :, rows, columns], 2, 1), own)
        return result

    def views(self, query: Query) -> dict[int, LayerView]:
        """Returns the layers as seen from a query pixel, averaged over the images."""
        return {
            number: LayerView(seen.probabilities.shape[3:], seen.queries[0], list(seen.probabilities[:, 0].mean(0)))
            for number, seen in self.average([query]).items()
        }

    def numbers(self) -> Numbers:
        """Returns what each layer's heads do."""
        return {number: measure.of_maps(layer[: self._number]) for number, layer in enumerate(self._layers)}


Source = RunSource | FileSource


def in_grid(query: Query, first: tuple[int, int], grid: tuple[int, int]) -> Query:
    """Returns the pixel of a `grid` that covers the middle of the query pixel of the `first` one."""
    row, column = (int((q + 0.5) * side / of) for q, side, of in zip(query, grid, first, strict=True))
    return row, column


def _check_number(number: int, count: int) -> None:
    if number >= count:
        raise UserError(f"--image is {number}, but the images are 0 to {count - 1}.")
