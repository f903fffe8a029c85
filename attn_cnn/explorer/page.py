"""Views and networks to one HTML file: numbers in base64, scripts and styles inline, and a policy that allows no more.

The file holds two documents, `view` and `networks`, each a JSON text and the numbers that it refers to. In the text an
array is {"$": [dtype, shape, place]}, its place being the first byte in the numbers, which are compressed (gzip) and
written in base64. Scripts are plain ones, in the order of `SCRIPTS`: a page opened from disk loads no modules.
"""

import base64
import gzip
import hashlib
import html
import json
import string
from typing import Any

import numpy as np
from etils import epath

from attn_cnn.explorer.network import Step
from attn_cnn.explorer.view import View

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
