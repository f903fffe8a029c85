"""Runs to one HTML file: numbers in base64, scripts and styles inline, and a policy that allows no more.

The file holds two documents, `view` and `networks`, each a JSON text and the numbers that it refers to. In the text an
array is {"$": [dtype, shape, place]}, its place being the first byte in the numbers, which are compressed (gzip) and
written in base64. Scripts are plain ones, in the order of `SCRIPTS`: a page opened from disk loads no modules.
"""

import base64
import gzip
import hashlib
import html
import json
import logging
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from attn_cnn import maps, paths
from attn_cnn.explorer import network, view
from attn_cnn.explorer.network import Step
from attn_cnn.explorer.view import View
from attn_cnn.training.runs import load_run
from attn_cnn.training.workdir import open_workdir

log = logging.getLogger("attn_cnn")

STATIC = epath.Path(__file__).parent / "static"
SCRIPTS = (
    "numbers.js",
    "mathematics.js",
    "network.js",
    "drawing.js",
    "state.js",
    "showing.js",
    "living.js",
    "saving.js",
    "controls.js",
)
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)
INLINED_BYTES = 2 * 2**20  # of a network in single precision; a larger one is left out, or in half precision


def of_runs(workdirs: Sequence[epath.PathLike], images: int, weights: bool, step: int | str) -> str:
    """Returns the page of the runs in `workdirs`, and logs which networks it leaves out.

    Args:
      workdirs: of one run or several.
      images: number of test images to show.
      weights: whether a network of more than `INLINED_BYTES` is part of the page, in half precision.
      step: which checkpoint, as `load_run` takes it.

    Raises:
      UserError: a run or its data cannot be read.
    """
    views: list[View] = []
    networks: list[list[Step] | None] = []
    for workdir in map(open_workdir, workdirs):
        run = load_run(workdir, step)
        steps = network.steps(run)
        large = 4 * network.size(steps) > INLINED_BYTES
        views.append(view.of_run(run, workdir.name, images, steps, large))
        views[-1]["history"] = view.history(workdir)
        if any(layer["parameters"]["encoding"] == "maps" for layer in views[-1]["layers"]):
            log.info("%s: the page cannot compute this encoding; it has its maps, and no network.", workdir)
            networks.append(None)
        elif large and not weights:
            log.info("%s: the page leaves the network out, which is large; --weights puts it in.", workdir)
            networks.append(None)
        else:
            networks.append([in_half_precision(step) for step in steps] if large else steps)
    return build(views, networks)


def of_maps(file: epath.PathLike, images: int) -> str:
    """Returns the page of the attention maps in a file, of its first images.

    Raises:
      UserError: the maps cannot be read.
    """
    path = paths.resolve(file, "--maps")
    return build([view.of_maps(path.name, maps.read(path), images)], [None])


def build(views: list[View], networks: list[list[Step] | None]) -> str:
    """Returns the page of some runs.

    Args:
      views: one for each run (`view.py`).
      networks: the steps of each run's network (`network.py`), or None where they are left out.
    """
    script = "\n".join((STATIC / name).read_text() for name in SCRIPTS)
    style = (STATIC / "page.css").read_text()
    view_json, view_numbers = pack(views)
    network_json, network_numbers = pack(networks)
    return string.Template((STATIC / "page.html").read_text()).substitute(
        policy=POLICY.format(script=_hash(script), style=_hash(style)),
        title=html.escape(" and ".join(view["name"] for view in views)),
        script=script,
        style=style,
        view=view_json,
        view_numbers=view_numbers,
        networks=network_json,
        network_numbers=network_numbers,
    )


def pack(tree: Any) -> tuple[str, str]:
    """Returns `tree`, of dicts, lists, texts, numbers and arrays, as JSON, and the numbers of its arrays in base64."""
    chunks, place = [], 0

    def written(value: Any) -> Any:
        nonlocal place
        if isinstance(value, dict):
            return {name: written(v) for name, v in value.items()}
        if isinstance(value, list | tuple):
            return [written(v) for v in value]
        if not hasattr(value, "dtype"):
            return value
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        reference = {"$": [array.dtype.name, list(array.shape), place]}
        chunks.append(content + bytes(-len(content) % 8))
        place += len(chunks[-1])
        return reference

    text = json.dumps(written(tree)).replace("<", "\\u003c")  # so that no name ends the script element
    return text, base64.b64encode(gzip.compress(b"".join(chunks), mtime=0)).decode()


def in_half_precision(step: Step) -> Step:
    """Returns a step with its kernels in half precision; biases and norms stay, being few."""

    def halved(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return in_half_precision(value)
        return value.astype(np.float16) if name in ("kernel", "value") else value

    return {name: halved(name, value) for name, value in step.items()}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
