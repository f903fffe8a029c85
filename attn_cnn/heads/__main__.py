"""What each head of a run does, and a run without some of its heads.

    python -m attn_cnn.heads report --workdir=RUN
    python -m attn_cnn.heads report --maps=FILE.npz
    python -m attn_cnn.heads prune --workdir=RUN --out=NEW --heads=2:0,2:5

`report` prints a table, or with --json the same as JSON, and names the degenerate heads; of a file of
attention maps (`attn_cnn/maps.py`) it prints what they alone tell. `prune` makes NEW the run in RUN, at its newest
checkpoint, without the heads named as layer:head, numbered as `report` does; NEW evaluates, and goes on with the
command that RUN was started with. The step of both is --step.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from absl import flags
from etils import epath
from jaxtyping import Array, Float, Shaped

from attn_cnn import cli, maps, paths
from attn_cnn.encodings import encoding_class
from attn_cnn.errors import UserError
from attn_cnn.heads import surgery as surgery_lib
from attn_cnn.heads.measure import IMAGES, degenerate, measure, of_maps
from attn_cnn.maps import Maps
from attn_cnn.model import has_heads
from attn_cnn.training import augment, data
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, precision_of
from attn_cnn.training.runs import Run, load_config, load_run, restore

GOES_WITH = {"json": "report", "maps": "report", "out": "prune", "heads": "prune"}
COLUMNS = ("layer", "head", "center", "width", "condition", "distance", "entropy", "3x3", "5x5", "most", "gate")


def images_of(run: Run) -> Float[Array, "batch height width channels"]:
    """Returns the normalised images over which a run's heads are measured: of the test set where content counts."""
    if not encoding_class(run.config.model.encoding).needs_x:
        return jnp.zeros((1, *run.config.model.image_shape))
    images = data.load_part(run.config.data).test_images[:IMAGES]
    return augment.normalize(images, run.mean, run.std)


def report(run: Run) -> list[dict[str, Any]]:
    """Returns of each head its layer, number, numbers by name, and why it is degenerate, or None.

    Raises:
      UserError: the run has no heads.
    """
    if not has_heads(run.config.model):
        raise UserError("this run has no heads to report.")
    with precision_of(run.config):
        by_layer = jax.jit(lambda params, images: measure(run.model, params, images))(run.params, images_of(run))
        reasons = degenerate(run.model, run.params, run.config.model.image_shape)
    return as_rows(by_layer, reasons)


def report_maps(maps: Maps) -> list[dict[str, Any]]:
    """Returns of each head in a file of attention maps its layer, number and what can be said from maps alone."""
    return as_rows({number: of_maps(layer) for number, layer in enumerate(maps.layers)}, {})


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


def as_table(rows: list[dict[str, Any]]) -> str:
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


def parse_heads(words: list[str]) -> dict[int, set[int]]:
    """Returns the heads of layers that words as 2:5 name.

    Raises:
      UserError: a word names none, or there are no words.
    """
    chosen: dict[int, set[int]] = {}
    for word in words:
        if not (found := re.fullmatch(r"(\d+):(\d+)", word.strip())):
            raise UserError(f"--heads has {word!r}, which is no layer:head, as in --heads=2:0,2:5.")
        chosen.setdefault(int(found[1]), set()).add(int(found[2]))
    if not chosen:
        raise UserError("prune needs the heads to remove, as in --heads=2:0,2:5.")
    return chosen


def prune(workdir: epath.PathLike, out: epath.PathLike, chosen: Mapping[int, set[int]], step: int | str) -> int:
    """Makes `out` the run in `workdir` at a checkpoint, without the `chosen` heads of layers; returns its step.

    What remains of the parameters and of the optimizer's state stays as it is.

    Raises:
      UserError: there is no such run, checkpoint or head, or `out` holds a run already.
    """
    workdir = workdir_lib.open_workdir(workdir)
    config, spec, surgery = load_config(workdir), workdir_lib.read_spec(workdir), workdir_lib.read_surgery(workdir)
    experiment = create_experiment(config, spec, surgery)
    if not has_heads(experiment.model_config):
        raise UserError(f"the run in {workdir} has no heads to prune.")
    there = surgery_lib.heads_of_layers(experiment.model_config)
    for layer, heads in chosen.items():
        if missing := heads - set(range(there.get(layer, 0))):
            raise UserError(
                f"--heads names {layer}:{min(missing)}, but the heads are "
                + ", ".join(f"{n}:0 to {n}:{count - 1}" for n, count in there.items())
                + "."
            )
    remaining = (surgery or surgery_lib.untouched(config.model)).pruned(chosen)
    create_experiment(config, experiment.spec, remaining)  # whose config may need heads that would be gone
    step, state = restore(experiment, workdir, step)
    state = surgery_lib.prune(state, experiment.model_config, chosen)
    workdir_lib.create(workdir_lib.open_workdir(out), config, experiment.spec, state, surgery=remaining)
    return step


def main(argv):
    given, what = flags.FLAGS, argv[1]
    if what not in ("report", "prune"):
        raise UserError(f"{what!r} is not understood; write report or prune.")
    for name, goes_with in GOES_WITH.items():
        if given[name].value != given[name].default and what != goes_with:
            raise UserError(f"--{name} goes with {goes_with} alone.")
    if (given.workdir is None) == (given.maps is None):
        raise UserError(f"{what} needs --workdir=RUN{', or --maps=FILE in its place' * (what == 'report')}.")
    if given.maps is not None and given["step"].present:
        raise UserError("--step goes with --workdir, not with --maps.")
    if what == "report":
        if given.maps is not None:
            rows = report_maps(maps.read(paths.resolve(given.maps, "--maps")))
        else:
            rows = report(load_run(given.workdir, cli.step()))
        print(as_json(rows) if given.json else as_table(rows))
        return
    if given.out is None:
        raise UserError("prune needs a workdir to make, as in --out=runs/pruned.")
    chosen = parse_heads(given.heads)
    step = prune(given.workdir, given.out, chosen, cli.step())
    print(f"{given.out} now holds step {step} of {given.workdir} without {sum(map(len, chosen.values()))} heads.")


def command() -> None:
    """Runs this command from a terminal."""
    flags.DEFINE_string("workdir", None, "The run's workdir.")
    flags.DEFINE_string("maps", None, "A file of attention maps to report in the place of a run.")
    flags.DEFINE_bool("json", False, "Print the report as JSON.")
    flags.DEFINE_string("out", None, "The workdir that prune makes.")
    flags.DEFINE_list("heads", [], "What prune removes: layer:head, as in 2:0,2:5.")
    cli.define_step()
    cli.run(main, arguments=("report or prune",), config=False)


if __name__ == "__main__":
    command()
