"""What `recover` finds as text, as JSON and as a figure."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import tabulate
from etils import epath
from matplotlib.figure import Figure

from attn_cnn import drawing, paths
from attn_cnn.convolution.kernels import WINDOW_SHARES
from attn_cnn.convolution.recover import Report
from attn_cnn.convolution.replace import AROUND_QUERY


def describe(report: Report) -> str:
    """Returns the report as text."""
    sections = [_describe_layer(layer) for layer in report["layers"]]
    if "accuracy" in report:
        sections.append(_describe_accuracy(report["accuracy"]))
    return "\n\n".join(sections)


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    return tabulate.tabulate(rows, headers, disable_numparse=True, stralign="right")


def _pair(pair: Iterable[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in pair)


def _describe_layer(layer: Report) -> str:
    shares = [f"{share:.0%} in" for share in WINDOW_SHARES]
    headers = ["head", "peak at", "peak", "mean shift", "deviation", *shares, "by shift", "by place", "by content"]
    extra = [name for name in ("center", "spread", "gate", "outside") if name in layer["heads"][0]]
    rows = []
    for head in layer["heads"]:
        row = [str(head["head"]), _pair(head["peak_shift"], 0), f"{head['peak']:.3f}"]
        row += [_pair(head["mean_shift"], 2), _pair(head["deviation"], 2)]
        row += [f"{side}x{side}" for side in head["windows"]]
        row += [f"{head[f'by_{part}']:.1%}" for part in ("shift", "place", "content")]
        formats = {
            "center": lambda v: _pair(v, 2),
            "spread": "{:.2f}".format,
            "gate": "{:.2f}".format,
            "outside": "{:.1%}".format,
        }
        rows.append(row + [formats[name](head[name]) for name in extra])
    height, width = layer["grid"]
    images = "1 image" if layer["images"] == 1 else f"{layer['images']} images"
    text = f"layer {layer['layer']}, {height}x{width} grid, maps of {images}\n{_table(rows, headers + extra)}"
    for heads in layer["sharing"]:
        text += f"\nheads {', '.join(map(str, heads))} share a target"
    for a, b in layer["mirrored"]:
        text += f"\nheads {a} and {b} mirror each other"
    return text + (f"\n\n{_describe_windows(layer['windows'])}" if "windows" in layer else "")


def _describe_windows(windows: list[Report]) -> str:
    headers = ["window", "first shift", "energy", "error where all is inside", "queries", "error on the whole grid"]
    rows = [
        [
            f"{w['side']}x{w['side']}",
            f"{w['top']}, {w['left']}",
            f"{w['energy']:.1%}",
            "none" if w["inside"] is None else f"{w['inside']:.3f}",
            str(w["queries"]),
            f"{w['everywhere']:.3f}",
        ]
        for w in windows
    ]
    return _table(rows, headers)


def _describe_accuracy(result: Report) -> str:
    layers = list(result["replaced"][0]["alone"])
    rows = [[f"{r['side']}x{r['side']}", r] for r in result["replaced"]]
    if around := result.get("around_query"):
        name = f"{around['side']}x{around['side']} around the query"
        rows += [[name, around["before"]], [f"{name}, an epoch later", around["after"]]]

    def cell(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    cells = [[name, *(cell(r["alone"].get(layer)) for layer in layers), cell(r["all"])] for name, r in rows]
    headers = ["replaced by", *(f"layer {layer} alone" for layer in layers), "all"]
    return f"test accuracy {result['as_trained']:.4f} as trained\n{_table(cells, headers)}"


def as_json(report: Report) -> str:
    """Returns the report as JSON; what a figure alone needs is left out."""

    def without_arrays(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: without_arrays(value) for name, value in tree.items() if not isinstance(value, np.ndarray)}
        return list(map(without_arrays, tree)) if isinstance(tree, list | tuple) else tree

    return json.dumps(without_arrays(report), indent=1) + "\n"


def draw(report: Report) -> Figure:
    """Draws the kernels by shift of each layer's heads, each scaled by itself, and the energy of the layer's own."""
    rows: list[list[np.ndarray]] = []
    titles, outlines = [], {}
    for layer in report["layers"]:
        names = [f"head {head['head']}: {head['peak']:.2f}" for head in layer["heads"]]
        images = list(layer["kernels"])
        if "energy" in layer:
            images.append(layer["energy"])
            three = [w for w in layer["windows"] if w["side"] == AROUND_QUERY.side]
            names.append(f"layer: {three[0]['energy']:.0%} in 3x3" if three else "layer")
            outlines[len(rows), len(images) - 1] = [(w["top"], w["left"], w["side"], w["side"]) for w in three]
        rows.append(images)
        titles.append(names)
    figure = drawing.by_shift(rows, titles, [f"layer {layer['layer']}" for layer in report["layers"]], outlines)
    text = "mean probability by shift in pixels, scaled by its largest, above it; cross: no shift"
    if outlines:
        text += "; last in each row: energy of the layer's kernel"
    if any(outlines.values()):
        text += ", and its best 3x3 window"
    drawing.note(figure, text)
    return figure


def write(report: Report, folder: epath.Path) -> None:
    """Writes recover.txt, recover.json and recover.png into a folder, which is made.

    Raises:
      UserError: it cannot be written.
    """
    paths.write(folder / "recover.txt", f"{describe(report)}\n".encode())
    paths.write(folder / "recover.json", as_json(report).encode())
    drawing.save(draw(report), folder / "recover.png")
