"""What each head of a run, or of a file of attention maps, does now: rows of numbers, as a table or as JSON."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from jaxtyping import Array, Float, Shaped

from attn_cnn.encodings import encoding_class
from attn_cnn.errors import UserError
from attn_cnn.heads import measure
from attn_cnn.maps import Maps
from attn_cnn.model import has_heads
from attn_cnn.training import augment, data
from attn_cnn.training.experiment import precision_of
from attn_cnn.training.runs import Run

COLUMNS = ("layer", "head", "center", "width", "condition", "distance", "entropy", "3x3", "5x5", "most", "gate")


def images_of(run: Run) -> Float[Array, "batch height width channels"]:
    """Returns the normalised images over which a run's heads are measured: of the test set where content counts."""
    if not encoding_class(run.config.model.encoding).needs_x:
        return jnp.zeros((1, *run.config.model.image_shape))
    images = data.load_with_test_set(run.config.data).test_images[: measure.IMAGES]
    return augment.normalize(images, run.mean, run.std)


def of_run(run: Run) -> list[dict[str, Any]]:
    """Returns of each head its layer, number, numbers by name, and why it is degenerate, or None.

    Raises:
      UserError: the run has no heads.
    """
    if not has_heads(run.config.model):
        raise UserError("this run has no heads to report.")
    with precision_of(run.config):
        numbers_of = jax.jit(lambda params, images: measure.measure(run.model, params, images))
        by_layer = numbers_of(run.params, images_of(run))
        reasons = measure.degenerate(run.model, run.params, run.config.model.image_shape)
    return as_rows(by_layer, reasons)


def of_maps(maps: Maps) -> list[dict[str, Any]]:
    """Returns of each head in a file of attention maps its layer, number and what can be said from maps alone."""
    return as_rows({number: measure.of_maps(layer) for number, layer in enumerate(maps.layers)}, {})


def as_rows(
    by_layer: Mapping[int, Mapping[str, Shaped[Array | np.ndarray, "heads *_"]]], reasons: Mapping[int, dict[int, str]]
) -> list[dict[str, Any]]:
    """Returns a row for each head, given the numbers of each layer's heads, and why some are degenerate."""
    rows = []
    for layer, numbers in by_layer.items():
        for head in range(len(numbers["entropy"])):
            row = {name: np.asarray(values[head]) for name, values in numbers.items()}
            rows.append({"layer": layer, "head": head, **row, "degenerate": reasons.get(layer, {}).get(head)})
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """Returns a report as a table to read."""
    lines, gated = [], "gate" in rows[0]
    for row in rows:
        widths = np.sqrt(np.maximum(np.linalg.eigvalsh(row["covariance"]), 0))[::-1]
        line = [row["layer"], row["head"], _pair(row.get("center", row["mean_shift"])), _pair(widths, " x ")]
        line += [f"{row['condition_number']:.3g}"]
        line += [f"{row[name]:.2f}" for name in ("nonlocality", "entropy", "mass_3x3", "mass_5x5")]
        line += [_pair(row["most_attended_shift"], digits=0), f"{row['gate']:.2f}" if gated else None]
        lines.append([*line[: len(COLUMNS) - (not gated)], row["degenerate"]])
    columns = [*COLUMNS[: len(COLUMNS) - (not gated)], "degenerate"]
    aligned = ["right"] * (len(columns) - 1) + ["left"]
    return tabulate.tabulate(lines, columns, disable_numparse=True, colalign=aligned)


def _pair(values: np.ndarray, between: str = ", ", digits: int = 2) -> str:
    return between.join(f"{value:.{digits}f}" for value in values)


def as_json(rows: list[dict[str, Any]]) -> str:
    """Returns a report as JSON, in which a number that is not finite is null."""

    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    rows = [{k: plain(v.tolist() if isinstance(v, np.ndarray) else v) for k, v in row.items()} for row in rows]
    return json.dumps(rows, indent=1)
