"""Trains the experiments at a scale, or sweeps a field of one, and writes the results as a table.

    python -m benchmarks.reproduce --scale=small --out=docs/results.md        # on a laptop
    python -m benchmarks.reproduce --scale=paper --out=docs/results_paper.md  # the paper's Table 1, on a GPU or TPU
    python -m benchmarks.reproduce --scale=digits --experiments=quadratic --seeds=0,1 --sweep=optimizer.momentum=0.8,0.9

Each run is one of main.py, in a folder of its own below --runs, with its output beside it. Stopped anywhere, the same
command goes on. Every seed is finished for all experiments before the next begins. Accuracy is of the last epoch, never
of the best by the test set. Beside the page lies a record, as docs/results.json: what it has by today's config is not
trained again, so that a page can be finished on other days and machines, once the runs are gone.
"""

import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
import tabulate
from absl import flags
from etils import epath

from attn_cnn import cli, drawing, paths
from attn_cnn.errors import UserError
from attn_cnn.figures import curves
from benchmarks import results
from benchmarks.results import Result

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
        return folder / self.run_name(seed)

    def run_name(self, seed: int) -> str:
        """Returns the name of the run with this seed, which is that of its workdir."""
        parts = [self.experiment, self.scale, *(f"{field}={value}" for field, value in self.fields), f"seed{seed}"]
        return re.sub(r"[^\w.=+-]", "_", "_".join(parts))

    def config(self) -> ml_collections.ConfigDict:
        """Returns the config as its file has it, without `fields`."""
        module = importlib.import_module(f"configs.{self.experiment}")
        return module.get_config("" if self.scale == "paper" else self.scale)

    def changes(self, found: Result) -> list[str]:
        """Returns in what a result's config differs from today's with these `fields`, as lines."""
        own = {"seed", "init_from", *(name for name, _ in self.fields)}
        return results.changes(found, self.config(), own)

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


def is_recorded(variant: Variant, seed: int, record: dict[str, Result]) -> bool:
    """Whether a record has the run with this seed by the config as it is now; says so where that differs."""
    found = record.get(variant.run_name(seed))
    changes = variant.changes(found) if found else []
    if changes:
        print(f"{variant.run_name(seed)} is recorded, but by another config: {'; '.join(changes)}", flush=True)
    return found is not None and not changes


def train(variant: Variant, folder: epath.Path, seed: int) -> str:
    """Trains a run to its end, unless it is there, and returns "", or the last line of its output where it failed."""
    workdir = variant.workdir(folder, seed)
    found = results.read(workdir)
    if found and (changes := variant.changes(found)):
        return f"{workdir.name}: there is a run by another config, to be moved away ({'; '.join(changes)})"
    if found and found.finished:
        return ""
    start = variant.start(folder, seed)
    if start and not ((before := results.read(start)) and before.finished):
        return f"{workdir.name}: {start.name}, from which it starts, is not finished"
    print(f"{workdir.name} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    with log.open("a") as output:
        failed = subprocess.run(variant.command(folder, seed), stdout=output, stderr=output).returncode
    return f"{workdir.name}: {(log.read_text().splitlines() or ['no output'])[-1]}" if failed else ""


def results_of(of: Iterable[tuple[Variant, int]], folder: epath.Path) -> dict[str, Result]:
    """Returns the results that variants with their seeds have by the config as it is now, by the run's name."""
    found = {(variant, seed): results.read(variant.workdir(folder, seed)) for variant, seed in of}
    return {v.run_name(seed): result for (v, seed), result in found.items() if result and not v.changes(result)}


def table(rows: dict[Variant, list[Result]]) -> str:
    """Returns the results of each variant, one for each seed that was begun, as a row of a table in Markdown."""
    headers = [
        "experiment",
        "accuracy",
        "mean",
        "parameters",
        "MFLOPs an image",
        "minutes",
        "the paper's, at its scale",
    ]
    cells = [_row(variant, found) for variant, found in rows.items()]
    return tabulate.tabulate(cells, headers, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def _row(variant: Variant, found: list[Result]) -> list[str]:
    if not found:
        return [variant.name, "not run", "", "", "", "", _paper(variant)]
    done = [each.accuracy[1][-1] for each in found if each.finished]
    spread = f" ± {np.std(done, ddof=1):.4f}" if len(done) > 1 else ""
    return [
        variant.name,
        ", ".join(map(_accuracy, found)),
        f"{np.mean(done):.4f}{spread}" if done else "",
        f"{found[0].parameters:,}",
        f"{found[0].flops / 1e6:.1f}",
        ", ".join(f"{each.minutes:.0f}" for each in found),
        _paper(variant),
    ]


def _accuracy(result: Result) -> str:
    unfinished = "" if result.finished else f" (epoch {result.epochs} of {result.config['epochs']})"
    return f"{result.accuracy[1][-1]:.4f}{unfinished}"


def _paper(variant: Variant) -> str:
    accuracy = None if variant.fields else curves.PAPER.get(variant.experiment)
    return f"{accuracy:.3f}" if accuracy else ""


def page_around(path: epath.Path) -> tuple[str, str]:
    """Returns what stands before and after the results in the page at `path`; nothing where there is no page yet.

    Raises:
      UserError: the page has no marks, between which results go.
    """
    page = path.read_text() if path.exists() else f"{BEGIN}{END}\n"
    if BEGIN not in page or END not in page:
        raise UserError(f"{path} has no {BEGIN} and {END}, between which results are written.")
    return page.split(BEGIN)[0], page.split(END)[1]


def write(path: epath.Path, text: str) -> None:
    """Puts the text between the marks in the page at `path`, or makes the page."""
    before, after = page_around(path)
    paths.write(path, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


def variants_of(experiments: Iterable[str], scale: str, sweep: Sequence[str]) -> list[Variant]:
    """Returns every experiment with every choice of the fields in `sweep`, each as in optimizer.momentum=0.8,0.9.

    A run of quadratic_pruned starts from the one of quadratic_generalized without these choices.
    """
    names_and_values = [each.split("=", 1) for each in sweep]
    fields = [[(name, value) for value in COMMA.split(values)] for name, values in names_and_values]
    return [Variant(experiment, scale, chosen) for experiment in experiments for chosen in itertools.product(*fields)]


def write_results(rows: dict[Variant, list[Result]], out: epath.Path) -> None:
    """Writes the table and, where there are results, the learning curves of each variant's first seed, into a page."""
    drawn = [results.curves_of(found[0], variant.name) for variant, found in rows.items() if found]
    picture = out.with_suffix(".png")
    if drawn:
        drawing.save(curves.draw(drawn), picture)
    write(out, "\n\n".join([table(rows), f"![Learning curves]({picture.name})"][: 1 + bool(drawn)]))


def check(given: flags.FlagValues) -> None:
    """Raises UserError where flags are wrong, or the page cannot take results."""
    if unknown := set(given.experiments) - set(EXPERIMENTS):
        raise UserError(f"--experiments names {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}.")
    if bad := [each for each in given.sweep if not all(each.partition("="))]:
        raise UserError(f"--sweep={bad[0]} is not understood; write it as in --sweep=optimizer.momentum=0.8,0.9.")
    swept = [each.partition("=")[0] for each in given.sweep]
    if len(set(swept)) < len(swept):
        raise UserError(f"--sweep names {max(swept, key=swept.count)} twice; give its values together.")
    if bad := [seed for seed in given.seeds or [""] if not seed.isdigit()]:
        raise UserError(f"--seeds names {bad[0]!r}; seeds are whole numbers, as in --seeds=0,1,2.")
    if given.out:
        page_around(paths.resolve(given.out, "--out"))


def main(_):
    given = flags.FLAGS
    check(given)
    folder, seeds = paths.resolve(given.runs, "--runs"), [int(seed) for seed in given.seeds]
    experiments = given.experiments
    if given.scale == "pyramid" and not flags.FLAGS["experiments"].present:
        experiments = [name for name in experiments if name != "resnet18"]  # its grid halves at every scale
    variants = variants_of(experiments, given.scale, given.sweep)
    out = paths.resolve(given.out, "--out") if given.out else None
    record = results.read_record(out.with_suffix(".json")) if out else {}
    asked = [(variant, seed) for seed in seeds for variant in variants]
    to_train = [(variant, seed) for variant, seed in asked if not is_recorded(variant, seed, record)]
    failures = [failure for variant, seed in to_train if (failure := train(variant, folder, seed))]
    trained, to_be_trained = results_of(to_train, folder), {variant.run_name(seed) for variant, seed in to_train}
    shown = {name: found for name, found in record.items() if name not in to_be_trained} | trained
    rows = {each: [shown[name] for seed in seeds if (name := each.run_name(seed)) in shown] for each in variants}
    print(table(rows))
    if out:
        finished = {name: result for name, result in trained.items() if result.finished}
        results.write_record(out.with_suffix(".json"), record | finished)
        write_results(rows, out)
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
