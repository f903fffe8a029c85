"""Trains the experiments at a scale, or sweeps a field of one, and writes the results as a table.

    python -m benchmarks.reproduce --scale=small --out=docs/results.md        # on a laptop
    python -m benchmarks.reproduce --scale=paper --experiments=quadratic,learned,learned_content,resnet18 \
      --out=docs/results_paper.md                                             # the paper's Table 1, on a GPU or TPU
    python -m benchmarks.reproduce --scale=digits --experiments=quadratic --seeds=0,1 --sweep=optimizer.momentum=0.8,0.9

Each run is one of main.py, in a folder of its own below --runs, with its output beside it. A signal to this command
stops the run too, and the same command goes on from there. Every seed is finished for all experiments before the next
begins. Accuracy is of the last epoch, never of the best by the test set.

After each run the page is written, and beside it a record, as docs/results.json. A run that the record has by today's
config is not trained again, and the page shows all that the record has at its scale: it can be finished on other days
and machines, where the former runs are gone. They all need the same copy of the data.
"""

import itertools
import re
import subprocess
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import tabulate
from absl import flags
from etils import epath

from attn_cnn import cli, drawing, paths
from attn_cnn.errors import Stopped, UserError, first_line
from attn_cnn.figures import curves
from attn_cnn.training import stopping
from attn_cnn.training.workdir import CONFIG
from benchmarks import results
from benchmarks.experiments import EXPERIMENTS, Run, Variant
from benchmarks.results import Result

BEGIN, END = "<!-- results -->", "<!-- /results -->"  # what lies between is written anew
COMMA = re.compile(r",(?![^(]*\))")  # none in a tuple


def train(run: Run, folder: epath.Path) -> str:
    """Trains a run to its end, first the one it starts from, and returns "" or, where that failed, why.

    A run that is there already is not trained again.
    """
    if run.start and (failure := train(run.start, folder)):
        return f"{run.name} needs {failure}"
    workdir = run.workdir(folder)
    try:
        found = results.read(workdir)
    except UserError as error:
        return str(error)
    if found and (changes := results.changes(run, found)):
        return f"{workdir}, which has another config: move it away ({'; '.join(changes)})"
    if found and found.finished:
        return ""
    print(f"{run.name} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if run.start and not workdir.exists():
        paths.write(results.start_file(workdir), (run.start.workdir(folder) / CONFIG).read_bytes())
    log = workdir.with_name(f"{run.name}.log")
    failed = run_to_its_end(run.command(folder), log)
    return f"{run.name}: {(log.read_text().splitlines() or ['no output'])[-1]}" if failed else ""


def run_to_its_end(command: list[str], log: epath.Path) -> int:
    """Runs a command with its output at the end of a log, and returns its exit status.

    Raises:
      Stopped: a signal came and was passed on; the command, which is one of main.py, has saved its state and ended.
      UserError: a signal came and was passed on, but the command did not end in order.
    """
    came: list[int] = []
    child: subprocess.Popen | None = None

    def pass_on(number, _):
        came.append(number)
        if child is not None:
            child.send_signal(number)

    former = stopping.listen(pass_on)
    try:
        with log.open("a") as output:  # in a session of its own no signal of the terminal reaches the command twice
            child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        for number in came[:1]:  # which came while it was started
            child.send_signal(number)
        status = child.wait()
    finally:
        stopping.restore(former)
    if came and status not in (0, -came[0], 128 + came[0]):
        raise UserError(f"stopped, but the run did not end in order; {log} says why.")
    if came:
        raise Stopped("stopped; the same command goes on.", came[0])
    return status


def gather(asked: Iterable[Run], folder: epath.Path, record: dict[Run, Result]) -> dict[Run, Result]:
    """Returns the results by today's configs: those in a record, and those in `folder` of the runs asked for."""
    wanted = dict.fromkeys(each for run in asked for each in (run.start, run) if each)
    recorded = {run: found for run, found in record.items() if not outdated(run, found)}
    read = {run: _read_or_none(run.workdir(folder)) for run in wanted if run not in recorded}
    return recorded | {run: found for run, found in read.items() if found and not outdated(run, found)}


def outdated(run: Run, found: Result) -> list[str]:
    """Returns why a result is not by today's config, as lines to read; none where it is."""
    if run.variant.experiment not in EXPERIMENTS:
        return [f"there is no experiment {run.variant.experiment} any more"]
    return results.changes(run, found)


def _read_or_none(workdir: epath.Path) -> Result | None:
    try:
        return results.read(workdir)
    except UserError:  # which `train` has said
        return None


def table(rows: dict[Variant, list[Result]]) -> str:
    """Returns the results of each variant, one for each seed that was begun, as a row of a table in Markdown."""
    splits = sorted({each.split for found in rows.values() for each in found})
    headers = [
        "experiment",
        " ".join([*splits, "accuracy"]),
        "mean",
        "parameters",
        "MFLOPs an image",
        "device minutes",
        "the paper's, at its scale",
    ]
    cells = [_row(variant, found) for variant, found in rows.items()]
    return tabulate.tabulate(cells, headers, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def _row(variant: Variant, found: list[Result]) -> list[str]:
    if not found:
        return [variant.name, "not run", "", "", "", "", _paper(variant)]
    done = [each.last_accuracy for each in found if each.finished]
    spread = f" ± {np.std(done, ddof=1):.4f}" if len(done) > 1 else ""
    return [
        variant.name,
        ", ".join(map(_accuracy, found)),
        f"{np.mean(done):.4f}{spread}" if done else "",
        f"{found[0].parameters:,}",
        f"{found[0].flops / 1e6:.1f}",
        ", ".join(f"{each.device_minutes:.0f}" for each in found),
        _paper(variant),
    ]


def _accuracy(result: Result) -> str:
    unfinished = "" if result.finished else f" (epoch {result.epochs} of {result.config['epochs']})"
    return f"{result.last_accuracy:.4f}{unfinished}"


def _paper(variant: Variant) -> str:
    accuracy = None if variant.fields else curves.PAPER.get(variant.experiment)
    return f"{accuracy:.3f}" if accuracy else ""


def page_around(path: epath.Path) -> tuple[str, str]:
    """Returns what stands before and after the results in the page at `path`; where there is no page yet, no text.

    Raises:
      UserError: the page cannot be read, or has not each mark once, between which results go.
    """
    if path.suffix != ".md":
        raise UserError(f"--out={path} is no page of Markdown; name one, as in --out=docs/results.md.")
    try:
        page = path.read_text() if path.exists() else f"{BEGIN}{END}\n"
    except paths.file_errors(ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not (page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)):
        raise UserError(f"{path} needs {BEGIN} and {END}, once each, between which results are written.")
    return page.partition(BEGIN)[0], page.partition(END)[2]


def write(path: epath.Path, text: str) -> None:
    """Puts the text between the marks in the page at `path`, or makes the page."""
    before, after = page_around(path)
    paths.write(path, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


def write_results(rows: dict[Variant, list[Result]], out: epath.Path) -> None:
    """Writes the table and, where there are results, the learning curves of each variant's first seed, into a page."""
    text, drawn = table(rows), [found[0].curves(variant.name) for variant, found in rows.items() if found]
    if drawn:
        picture = out.with_suffix(".png")
        drawing.save(curves.draw(drawn), picture)
        text += f"\n\n![Learning curves]({picture.name})"
    write(out, text)


def variants_of(experiments: Iterable[str], scale: str, sweep: Sequence[str]) -> list[Variant]:
    """Returns every experiment with every choice of the fields in `sweep`, each as in optimizer.momentum=0.8,0.9.

    A run of quadratic_pruned starts from the one of quadratic_generalized without these choices.
    """
    names_and_values = [each.split("=", 1) for each in sweep]
    fields = [[(name, value) for value in COMMA.split(values)] for name, values in names_and_values]
    return [Variant(experiment, scale, chosen) for experiment in experiments for chosen in itertools.product(*fields)]


def publish(asked: list[Run], folder: epath.Path, out: epath.Path | None) -> dict[Variant, list[Result]]:
    """Returns the results, by variant and seed, of what is asked for and of what else the record has at that scale.

    With a page, `out`, it writes page and record.
    """
    record = results.read_record(out.with_suffix(".json")) if out else {}
    found = gather(asked, folder, record)
    scales = {run.variant.scale for run in asked}
    at_scale = dict.fromkeys(run.variant for run in [*asked, *sorted(found)] if run.variant.scale in scales)
    variants = sorted(at_scale, key=lambda variant: EXPERIMENTS.index(variant.experiment))
    rows = {variant: [found[run] for run in sorted(found) if run.variant == variant] for variant in variants}
    if out:
        finished = {run: each for run, each in found.items() if each.finished}
        latest = results.read_record(out.with_suffix(".json"))  # another command may have written meanwhile
        results.write_record(out.with_suffix(".json"), latest | finished)
        write_results(rows, out)
    return rows


def reproduce(asked: list[Run], folder: epath.Path, out: epath.Path | None) -> list[str]:
    """Trains what is not recorded by today's config, writes page and record after each run, and returns what failed."""
    record = results.read_record(out.with_suffix(".json")) if out else {}
    for run, found in record.items():
        if lines := outdated(run, found):
            print(f"Recorded, but by another config, and left out: {run.name} ({'; '.join(lines)})", flush=True)
    failures: list[str] = []
    for run in asked:
        if out:
            record = results.read_record(out.with_suffix(".json"))  # another command may have written meanwhile
        if run in record and not outdated(run, record[run]):
            continue
        failures += filter(None, [train(run, folder)])
        if out:
            publish(asked, folder, out)
    return failures


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
    if len({int(seed) for seed in given.seeds}) < len(given.seeds):
        raise UserError(f"--seeds={','.join(given.seeds)} names a seed twice.")
    if given.out:
        page_around(paths.resolve(given.out, "--out"))


def main(_):
    given = flags.FLAGS
    check(given)
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
    folder, out = paths.resolve(given.runs, "--runs"), paths.resolve(given.out, "--out") if given.out else None
    experiments = given.experiments
    if given.scale == "pyramid" and not flags.FLAGS["experiments"].present:
        experiments = [name for name in experiments if name != "resnet18"]  # its grid halves at every scale
    variants = variants_of(experiments, given.scale, given.sweep)
    asked = [Run(variant, int(seed)) for seed in given.seeds for variant in variants]
    failures = reproduce(asked, folder, out)
    print(table(publish(asked, folder, out)))
    if failures:
        raise UserError("Not all is finished; the same command goes on. What failed: " + "; ".join(failures))


if __name__ == "__main__":
    flags.DEFINE_enum("scale", "small", ["paper", "small", "pyramid", "digits"], "At what scale.")
    flags.DEFINE_list("experiments", list(EXPERIMENTS), "Which experiments.")
    flags.DEFINE_list("seeds", ["0"], "Which seeds, the first of all experiments first.")
    flags.DEFINE_multi_string("sweep", [], "A field and its values, as in optimizer.momentum=0.8,0.9.")
    flags.DEFINE_string("runs", "runs/reproduce", "Where the runs live.")
    flags.DEFINE_string("out", None, "The page to write the table and the learning curves into.")
    cli.run(main, config=False)
