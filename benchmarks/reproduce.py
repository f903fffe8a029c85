"""Trains the experiments at a scale, or sweeps a field of one, and writes the results as a table.

    python -m benchmarks.reproduce --scale=small --out=docs/results.md        # on a laptop
    python -m benchmarks.reproduce --scale=paper --out=docs/results_paper.md  # the paper's Table 1, on a GPU or TPU
    python -m benchmarks.reproduce --scale=digits --experiments=quadratic --seeds=0,1 --sweep=optimizer.momentum=0.8,0.9

Each run is one of main.py, in a folder of its own below --runs, with its output beside it. Stopped anywhere, the same
command goes on. Every seed is finished for all experiments before the next begins. Accuracy is of the last epoch, never
of the best by the test set.
"""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tabulate
from absl import flags
from etils import epath

from attn_cnn import cli, drawing, paths, report
from attn_cnn.errors import UserError
from attn_cnn.figures import curves
from attn_cnn.model import abstract_variables
from attn_cnn.training import metrics, runs

EXPERIMENTS = (
    "quadratic",
    "convolution",
    "resnet18",
    "learned",
    "quadratic_generalized",
    "quadratic_pruned",
    "learned_content",
    "gated",
    "learned_query",
    "learned_content_position",
    "many_heads",
)
BEGIN, END = "<!-- results -->", "<!-- /results -->"  # what lies between is written anew
COMMA = re.compile(r",(?![^(]*\))")  # none in a tuple


class Variant(NamedTuple):
    """An experiment at a scale with some fields of its config set, trained once for each seed.

    Attributes:
      experiment: the config's name.
      scale: "paper", or as after the colon in configs/quadratic.py:small.
      fields: name and value of each field, as on the command line.
    """

    experiment: str
    scale: str
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What a table calls it."""
        return " ".join([self.experiment, *(f"{field}={value}" for field, value in self.fields)])

    def workdir(self, folder: epath.Path, seed: int) -> epath.Path:
        """Returns where the run with this seed lives."""
        parts = [self.experiment, self.scale, *(f"{field}={value}" for field, value in self.fields), f"seed{seed}"]
        return folder / re.sub(r"[^\w.=+-]", "_", "_".join(parts))

    def start(self, folder: epath.Path, seed: int) -> epath.Path | None:
        """Returns the run that the one with this seed starts from, or None."""
        if self.experiment != "quadratic_pruned":
            return None
        return Variant("quadratic_generalized", self.scale).workdir(folder, seed)

    def command(self, folder: epath.Path, seed: int) -> list[str]:
        """Returns the command that trains the run with this seed."""
        scale = "" if self.scale == "paper" else f":{self.scale}"
        arguments = [f"--config=configs/{self.experiment}.py{scale}", f"--workdir={self.workdir(folder, seed)}"]
        if start := self.start(folder, seed):
            arguments.append(f"--config.init_from={start}")
        fields = [("seed", str(seed)), *self.fields]
        return [sys.executable, "main.py", *arguments, *(f"--config.{field}={value}" for field, value in fields)]


class Result(NamedTuple):
    """What a run has come to.

    Attributes:
      epochs: epochs done.
      of: epochs there are to be.
      accuracy: of the last epoch, on what the run is evaluated on.
      minutes: spent in training steps, by their measured rate; compilation and evaluation come on top.
    """

    epochs: int
    of: int
    accuracy: float
    minutes: float


def result(workdir: epath.Path) -> Result | None:
    """Returns what the run in `workdir` has come to; None where it has not finished an epoch."""
    if not (workdir / "config.json").exists():
        return None
    try:
        epochs, accuracies = curves.read(workdir, workdir.name).accuracy
    except UserError:
        return None
    config = runs.load_config(workdir)
    minutes = training_seconds(workdir, config.batch_size) / 60
    return Result(round(epochs[-1]), config.epochs, float(accuracies[-1]), minutes)


def results_of(variant: Variant, folder: epath.Path, seeds: Sequence[int]) -> dict[epath.Path, Result]:
    """Returns the results of a variant's runs that have some, by workdir."""
    workdirs = [variant.workdir(folder, seed) for seed in seeds]
    return {workdir: found for workdir in workdirs if (found := result(workdir))}


def training_seconds(workdir: epath.Path, batch_size: int) -> float:
    """Returns the seconds that a run's steps took, on as many devices as are here."""
    scalars = metrics.read(workdir / "metrics")
    measured = {step: value for step, tag, value in scalars if tag == "images_per_second_per_device"}
    steps, rates = np.array(sorted(measured.items())).reshape(-1, 2).T
    return float(sum(np.diff(steps, prepend=0) * batch_size / jax.device_count() / rates))


def train(variant: Variant, folder: epath.Path, seed: int) -> str:
    """Trains a run to its end, unless it is there, and returns "", or the last line of its output where it failed."""
    workdir = variant.workdir(folder, seed)
    found = result(workdir)
    if found and found.epochs == found.of:
        return ""
    start = variant.start(folder, seed)
    if start and not ((before := result(start)) and before.epochs == before.of):
        return f"{workdir.name}: {start.name}, from which it starts, is not finished"
    print(f"{workdir.name} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    with log.open("a") as output:
        failed = subprocess.run(variant.command(folder, seed), stdout=output, stderr=output).returncode
    return f"{workdir.name}: {(log.read_text().splitlines() or ['no output'])[-1]}" if failed else ""


def table(results: dict[Variant, dict[epath.Path, Result]]) -> str:
    """Returns the results, by variant and workdir, as a row for each variant, in Markdown."""
    rows = [_row(variant, of_workdirs) for variant, of_workdirs in results.items()]
    headers = [
        "experiment",
        "accuracy",
        "mean",
        "parameters",
        "MFLOPs an image",
        "minutes",
        "the paper's, at its scale",
    ]
    return tabulate.tabulate(rows, headers, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def _row(variant: Variant, results: dict[epath.Path, Result]) -> list[str]:
    if not results:
        return [variant.name, "not run", "", "", "", "", _paper(variant)]
    found, first = list(results.values()), next(iter(results))
    done = [each.accuracy for each in found if each.epochs == each.of]
    spread = f" ± {np.std(done, ddof=1):.4f}" if len(done) > 1 else ""
    model = runs.model_as_left(runs.load_config(first), first)
    return [
        variant.name,
        ", ".join(map(_accuracy, found)),
        f"{np.mean(done):.4f}{spread}" if done else "",
        f"{report.count_parameters(abstract_variables(model)['params']):,}",
        f"{report.paper_flops(model) / 1e6:.1f}",
        ", ".join(f"{each.minutes:.0f}" for each in found),
        _paper(variant),
    ]


def _accuracy(result: Result) -> str:
    unfinished = "" if result.epochs == result.of else f" (epoch {result.epochs} of {result.of})"
    return f"{result.accuracy:.4f}{unfinished}"


def _paper(variant: Variant) -> str:
    accuracy = None if variant.fields else curves.PAPER.get(variant.experiment)
    return f"{accuracy:.3f}" if accuracy else ""


def write(path: epath.Path, text: str) -> None:
    """Puts the text between the marks in the page at `path`, or makes the page."""
    page = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    if BEGIN not in page or END not in page:
        raise UserError(f"{path} has no {BEGIN} and {END}, between which results are written.")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def variants_of(experiments: Iterable[str], scale: str, sweep: Sequence[str]) -> list[Variant]:
    """Returns every experiment with every choice of the fields in `sweep`, each as in optimizer.momentum=0.8,0.9.

    A run of quadratic_pruned starts from the one of quadratic_generalized without these choices.
    """
    names_and_values = [each.split("=", 1) for each in sweep]
    fields = [[(name, value) for value in COMMA.split(values)] for name, values in names_and_values]
    return [Variant(experiment, scale, chosen) for experiment in experiments for chosen in itertools.product(*fields)]


def write_results(results: dict[Variant, dict[epath.Path, Result]], out: epath.Path) -> None:
    """Writes the table, and the learning curves of the first seed of each variant, into a page."""
    drawn = [curves.read(next(iter(runs_of)), variant.name) for variant, runs_of in results.items() if runs_of]
    picture = out.with_suffix(".png")
    drawing.save(curves.draw(drawn), picture)
    write(out, f"{table(results)}\n\n![Learning curves]({picture.name})")


def main(_):
    given = flags.FLAGS
    if unknown := set(given.experiments) - set(EXPERIMENTS):
        raise UserError(f"--experiments names {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}.")
    if bad := [each for each in given.sweep if not all(each.partition("="))]:
        raise UserError(f"--sweep={bad[0]} is not understood; write it as in --sweep=optimizer.momentum=0.8,0.9.")
    swept = [each.partition("=")[0] for each in given.sweep]
    if len(set(swept)) < len(swept):
        raise UserError(f"--sweep names {max(swept, key=swept.count)} twice; give its values together.")
    if bad := [seed for seed in given.seeds or [""] if not seed.isdigit()]:
        raise UserError(f"--seeds names {bad[0]!r}; seeds are whole numbers, as in --seeds=0,1,2.")
    folder, seeds = paths.resolve(given.runs, "--runs"), [int(seed) for seed in given.seeds]
    experiments = given.experiments
    if given.scale == "pyramid" and not flags.FLAGS["experiments"].present:
        experiments = [name for name in experiments if name != "resnet18"]  # its grid halves at every scale
    variants = variants_of(experiments, given.scale, given.sweep)
    failures = [failure for seed in seeds for each in variants if (failure := train(each, folder, seed))]
    results = {each: results_of(each, folder, seeds) for each in variants}
    print(table(results))
    if given.out:
        write_results(results, paths.resolve(given.out, "--out"))
    if failures:
        raise UserError("These runs failed, and go on with the same command: " + "; ".join(failures))


if __name__ == "__main__":
    flags.DEFINE_enum("scale", "small", ["paper", "small", "pyramid", "digits"], "At what scale.")
    flags.DEFINE_list("experiments", list(EXPERIMENTS), "Which experiments.")
    flags.DEFINE_list("seeds", ["0"], "Which seeds, the first of all experiments first.")
    flags.DEFINE_multi_string("sweep", [], "A field and its values, as in optimizer.momentum=0.8,0.9.")
    flags.DEFINE_string("runs", "runs/reproduce", "Where the runs live.")
    flags.DEFINE_string("out", None, "The page to write the table and the learning curves into.")
    cli.run(main, config=False)
