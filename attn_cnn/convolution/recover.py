"""How much of a convolution a trained network's attention is: heads by shift, layers by window, accuracy once replaced.

The report is a tree of plain values (and arrays for its figure), as `report.py` writes it:

    heads      of each layer: its kernel's `kernels.Shape`, the `kernels.Dependence` of its squared probabilities, the
               center, spread and gate that its encoding holds, and, where it depends on positions alone, `outside`, the
               share of its ideal kernel that lies outside the grid, averaged over queries
    windows    of each layer and side K: the K x K window with the most energy of its kernel, that share, and the error
               of the layer's output when replaced by the convolution in that window
    accuracy   of the network on the test set when layers are replaced by those convolutions, one alone or all; and by
               the 3 x 3 windows around the query, before and after an epoch of training

The maps of a file have heads alone.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from attn_cnn import attention
from attn_cnn.convolution import kernels as kernels_lib
from attn_cnn.convolution import replace
from attn_cnn.convolution.kernels import Average, Window
from attn_cnn.convolution.replace import AROUND_QUERY, Cut
from attn_cnn.convolution.theorem import kernels_by_shift, outside
from attn_cnn.encodings import Encoding, encoding_class
from attn_cnn.errors import UserError
from attn_cnn.heads import measure
from attn_cnn.heads.surgery import numbers_of_heads
from attn_cnn.maps import Maps
from attn_cnn.predict import accuracy, batches, logits
from attn_cnn.training import augment, data
from attn_cnn.training.dataset import Dataset
from attn_cnn.training.experiment import precision_of
from attn_cnn.training.runs import Run

SIDES = (1, 3, 5, 7)
Report = dict[str, Any]
Measure = Callable[[dict[int, Cut]], float]  # of the network with some layers replaced


class Layer(NamedTuple):
    """An attention layer as a convolution: its heads' kernels by shift and its value matrices."""

    kernels: Float[np.ndarray, "heads rows columns"]
    value: Float[np.ndarray, "heads inputs outputs"]

    def energy(self) -> Float[np.ndarray, "rows columns"]:
        """Returns the energy of the layer's kernel at each shift."""
        return kernels_lib.energy(self.kernels, self.value)

    def sides(self) -> list[int]:
        """Returns the sides of windows that the shifts of its grid have room for."""
        return [side for side in SIDES if side <= min(self.kernels.shape[1:])]

    def cut(self, window: Window) -> Cut:
        """Returns the convolution in a window."""
        return Cut(window, kernels_lib.cut_kernel(self.kernels, self.value, window))


def averages(batches: Iterable[list[Array]]) -> list[Average]:
    """Returns the average maps of each layer over batches of images."""
    total: list[Average] = []
    for maps in batches:
        batch = [Average.of(np.asarray(layer)) for layer in maps]
        total = [a.with_more(b) for a, b in zip(total, batch, strict=True)] if total else batch
    return total


def recover_maps(maps: Maps) -> Report:
    """Returns what can be said of heads from maps alone."""
    return {"layers": [report_of_layer(number, Average.of(layer)) for number, layer in enumerate(maps.layers)]}


def report_of_layer(number: int, average: Average) -> Report:
    """Returns what can be said of a layer's heads from their maps alone."""
    kernels, dependence = kernels_lib.kernels(average.mean), kernels_lib.dependence(average)
    shapes = list(map(kernels_lib.shape, kernels))
    heads = [
        {"head": head}
        | shape._asdict()
        | {f"by_{name}": float(share[head]) for name, share in dependence._asdict().items()}
        for head, shape in enumerate(shapes)
    ]
    targets = [shape.target for shape in shapes]
    return {
        "layer": number,
        "grid": average.mean.shape[1:3],
        "images": average.images,
        "heads": heads,
        "sharing": kernels_lib.sharing(targets),
        "mirrored": kernels_lib.mirrored(targets),
        "kernels": kernels,
    }


def maps_of_run(run: Run, images: UInt8[np.ndarray, "images height width channels"]) -> dict[int, Average]:
    """Returns the average maps of each attention layer of a run by the layer's number.

    Those of a position-only encoding are the same for all images, and computed for one.

    Raises:
      UserError: the run has no attention layers to map.
    """
    if run.config.model.name != "attention":
        raise UserError(
            f"config.model.name is {run.config.model.name}; recover reads runs of attention models, as of "
            "configs/quadratic.py."
        )
    numbers = list(numbers_of_heads(run.config.model))
    if not numbers:
        raise UserError("the run has no attention layers with heads; recover reads those that do.")
    if not encoding_class(run.config.model.encoding).needs_x:
        images = images[:1]
    maps = jax.jit(lambda params, batch: attention.attention_maps(run.model, params, batch))
    of_batches = (maps(run.params, augment.normalize(batch, run.mean, run.std)) for batch in batches(run, images))
    with precision_of(run.config):
        return dict(zip(numbers, averages(of_batches), strict=True))


def add_parameters(report: Report, encoding: Encoding) -> None:
    """Adds to a layer's heads what their encoding says: center, spread, gate, how much lies outside the grid."""
    gaussians, numbers = encoding.gaussians(), encoding.numbers()
    out = None if encoding.needs_x else outside(kernels_by_shift(encoding, tuple(report["grid"]))).mean((1, 2))
    for number, head in enumerate(report["heads"]):
        if gaussians is not None:
            head["center"] = gaussians.centers[number].tolist()
            # Of a matrix, the geometric mean of its two.
            head["spread"] = float(np.linalg.det(np.asarray(gaussians.precisions[number], np.float64)) ** 0.25)
        head |= {name: float(values[number]) for name, values in numbers.items()}
        if out is not None:
            head["outside"] = float(out[number])


def windows_of(layer: Layer) -> tuple[list[Cut], list[float]]:
    """Returns the best window of each side, as convolutions, and their shares of the energy of the layer's kernel."""
    energy = layer.energy()
    best = [kernels_lib.best_window(energy, side) for side in layer.sides()]
    return [layer.cut(window) for window, _ in best], [total / energy.sum() for _, total in best]


def recover(run: Run, images: int, tune: epath.Path | None = None) -> Report:
    """Returns how much of a convolution each attention layer of a run is.

    Args:
      run: the run of an attention model.
      images: number of test images for averages of maps and for errors of layers; accuracies are of all.
      tune: the folder for runs that train replaced networks for an epoch; None: none are trained.

    Raises:
      UserError: the run has no attention layers.
    """
    test = data.load_with_test_set(run.config.data)
    some = test.test_images[:images]
    reports = [report_of_layer(*of_layer) for of_layer in maps_of_run(run, some).items()]
    with precision_of(run.config):
        encodings = measure.encodings(run.model, run.params, run.config.model.image_shape)
        for report in reports:
            add_parameters(report, encodings[report["layer"]])
    best: dict[int, list[Cut]] = {}
    shares: dict[int, list[float]] = {}
    around: dict[int, Cut | None] = {}
    for report in reports:
        number = report["layer"]
        value = run.params[f"layer_{number}"]["attention"]["value"]["kernel"]
        layer = Layer(report["kernels"], np.asarray(value))
        report["energy"] = layer.energy()
        best[number], shares[number] = windows_of(layer)
        around[number] = layer.cut(AROUND_QUERY) if AROUND_QUERY.side in layer.sides() else None
    errors = replace.layer_errors(run, best, some)
    for report in reports:
        of_windows = zip(*(found[report["layer"]] for found in (best, shares, errors)), strict=True)
        report["windows"] = [cut.window._asdict() | {"energy": share} | e._asdict() for cut, share, e in of_windows]
    replaced = accuracies(run, test, best)
    if tune is not None:
        replaced["around_query"] = around_query_accuracies(run, test, around, tune)
    return {"step": run.step, "config": run.config.to_dict(), "layers": reports, "accuracy": replaced}


def accuracies(run: Run, test: Dataset, cuts: dict[int, list[Cut]]) -> Report:
    """Returns the test accuracy of the network as it is, and with layers replaced, by the side of the windows."""
    measured = _measured_replaced(run, test)
    result: Report = {"as_trained": measured({}), "replaced": []}
    for i, side in enumerate(SIDES):
        if any(i < len(best) for best in cuts.values()):
            of_side = {number: best[i] if i < len(best) else None for number, best in cuts.items()}
            result["replaced"].append({"side": side} | _alone_and_all(of_side, measured))
    return result


def around_query_accuracies(run: Run, test: Dataset, around: dict[int, Cut | None], folder: epath.Path) -> Report:
    """Returns the test accuracy with windows around the query in the place of layers, before and after an epoch."""

    def measured_tuned(replaced: dict[int, Cut]) -> float:
        number, *others = replaced
        tuned = replace.tuned_run(run, replaced, folder / ("all" if others else f"layer_{number}"))
        return accuracy(logits(tuned, test.test_images), test.test_labels)

    return {
        "side": AROUND_QUERY.side,
        "before": _alone_and_all(around, _measured_replaced(run, test)),
        "after": _alone_and_all(around, measured_tuned),
    }


def _measured_replaced(run: Run, test: Dataset) -> Measure:
    return lambda replaced: accuracy(logits(run, test.test_images, replace.replacing(replaced)), test.test_labels)


def _alone_and_all(cuts: dict[int, Cut | None], measured: Measure) -> Report:
    """Returns a measure with each layer replaced alone, and with all of them where all can be."""
    having = {number: cut for number, cut in cuts.items() if cut is not None}
    alone = {str(number): measured({number: cut}) for number, cut in having.items()}
    return {"alone": alone, "all": measured(having) if len(having) == len(cuts) else None}
