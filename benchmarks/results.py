"""What runs have come to, read from their workdirs or from a record of them: a JSON file that outlives the runs.

The record holds for each run the config as it was given and the numbers that a page of results needs, so that runs of
several days and machines come into one page. That all of them had the same copy of the data is not checked.
"""

import json
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath

from attn_cnn import paths, report
from attn_cnn.errors import UserError, first_line
from attn_cnn.figures import curves
from attn_cnn.heads.history import evenly
from attn_cnn.model import abstract_variables
from attn_cnn.training import metrics, runs, workdir
from attn_cnn.training.experiment import checked
from benchmarks.experiments import Run, Variant

POINTS = 100  # of the training loss that are kept


class Result(NamedTuple):
    """What a run has come to.

    Attributes:
      config: the run's config as it was given, without the machine's folders.
      start: that of the run it started from; None: there was none, or it is not known.
      epochs: epochs done, of those in `config`.
      accuracy: epochs, and the accuracy after each on what the run is evaluated on.
      loss: epochs, and the training loss there.
      split: "test" or "validation", what the run is evaluated on.
      device_minutes: spent in training steps, by their measured rate; compilation and evaluation come on top.
      parameters: of the model, without the heads that were pruned.
      flops: of one image, as `report.paper_flops` counts them.
    """

    config: dict[str, Any]
    start: dict[str, Any] | None
    epochs: int
    accuracy: list[list[float]]
    loss: list[list[float]]
    split: str
    device_minutes: float
    parameters: int
    flops: int

    @property
    def finished(self) -> bool:
        """Whether no epoch is missing."""
        return self.epochs == self.config["epochs"]

    @property
    def last_accuracy(self) -> float:
        """The accuracy after the last epoch that was done."""
        return self.accuracy[1][-1]

    def curves(self, name: str) -> curves.Curves:
        """Returns the learning curves, which a legend calls `name`."""
        paper = curves.paper_accuracy(workdir.config_of(self.config))
        return curves.Curves(name, np.array(self.loss), np.array(self.accuracy), self.split, paper)


def start_file(workdir: epath.Path) -> epath.Path:
    """Returns where, beside a run's workdir, the config of the run stands that it started from."""
    return workdir.with_name(f"{workdir.name}.start.json")


def read(place: epath.Path) -> Result | None:
    """Returns what the run in a workdir has come to; None where there is none, or it has not finished an epoch.

    Raises:
      UserError: the workdir is damaged.
    """
    if not (place / workdir.CONFIG).exists():
        return None
    config = runs.load_config(place)
    try:
        drawn = curves.read(place, place.name)
    except curves.NothingYet:
        return None
    model = runs.model_as_left(config, place)
    start = start_file(place)
    return Result(
        config=without_folders(config),
        start=without_folders(workdir.read_config(start)) if start.exists() else None,
        epochs=round(drawn.accuracy[0, -1]),
        accuracy=drawn.accuracy.round(6).tolist(),
        loss=drawn.loss[:, evenly(drawn.loss.shape[1], POINTS)].round(4).tolist(),
        split=drawn.split,
        device_minutes=round(device_seconds(place, config.batch_size) / 60, 1),
        parameters=report.count_parameters(abstract_variables(model)["params"]),
        flops=report.paper_flops(model),
    )


def without_folders(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config as JSON has it, without what only the machine that trains by it has: its folders."""
    plain = json.loads(config.to_json())
    start = epath.Path(config.init_from).name if config.init_from else ""
    return plain | {"data": plain["data"] | {"dir": ""}, "init_from": start}


def device_seconds(place: epath.Path, batch_size: int) -> float:
    """Returns the seconds that the steps of the run in a workdir took, times the number of devices."""
    scalars = metrics.read(place / "metrics")
    measured = {step: value for step, tag, value in scalars if tag == "images_per_second_per_device"}
    steps, rates = np.array(sorted(measured.items())).reshape(-1, 2).T
    return float(sum(np.diff(steps, prepend=0) * batch_size / rates))


def changes(run: Run, found: Result) -> list[str]:
    """Returns the fields by which a run's result and today's config differ, its start's included, as lines to read."""
    lines = _changes(run, found.config)
    if run.start:
        lines += _changes(run.start, found.start) if found.start else [f"the config of {run.start.name} is not known"]
    return lines


def _changes(run: Run, config: dict[str, Any]) -> list[str]:
    own = {"seed", *(name for name, _ in run.variant.fields), *(["init_from"] if run.start else [])}
    try:
        then = checked(workdir.config_of(config))
    except UserError as error:
        return [str(error)]
    lines = workdir.differences(checked(run.variant.config()), then)
    return [line for line in lines if line.partition(":")[0] not in own]


def read_record(path: epath.Path) -> dict[Run, Result]:
    """Returns the results in a record, none where there is no record yet.

    Raises:
      UserError: it is no record.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {_run_of(entry.pop("run")): Result(**entry) for entry in entries}
    except paths.file_errors(ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is no record of results ({first_line(error)}); mend it, or move it away.") from None


def _run_of(entry: dict[str, Any]) -> Run:
    fields = tuple((name, value) for name, value in entry["fields"])
    return Run(Variant(entry["experiment"], entry["scale"], fields), entry["seed"])


def write_record(path: epath.Path, results: dict[Run, Result]) -> None:
    """Writes a record, a line for each run.

    Raises:
      UserError: it cannot be written.
    """
    entries = [
        {"run": run.variant._asdict() | {"seed": run.seed}} | found._asdict()
        for run, found in sorted(results.items(), key=lambda entry: entry[0].name)
    ]
    paths.write(path, ("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n").encode())
