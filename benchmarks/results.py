"""What runs have come to, read from their workdirs or from a record of them: a JSON file that outlives the runs.

The record holds for each run, by the name of its workdir, the config as it was given and the numbers that a page of
results needs, so that runs of several days and machines come into one page.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from attn_cnn import paths, report
from attn_cnn.errors import UserError
from attn_cnn.figures import curves
from attn_cnn.model import abstract_variables
from attn_cnn.schema import flatten
from attn_cnn.training import metrics, runs
from attn_cnn.training.experiment import checked
from attn_cnn.training.workdir import differences


class Result(NamedTuple):
    """What a run has come to.

    Attributes:
      config: the run's config as it was given, without the machine's folders.
      epochs: epochs done, of those in `config`.
      accuracy: epochs, and the accuracy after each on what the run is evaluated on.
      loss: epochs, and the mean training loss of each.
      split: "test" or "validation", what the run is evaluated on.
      minutes: spent in training steps, by their measured rate; compilation and evaluation come on top.
      parameters: of the model, without the heads that were pruned.
      flops: of one image, as `report.paper_flops` counts them.
    """

    config: dict[str, Any]
    epochs: int
    accuracy: list[list[float]]
    loss: list[list[float]]
    split: str
    minutes: float
    parameters: int
    flops: int

    @property
    def finished(self) -> bool:
        """Whether no epoch is missing."""
        return self.epochs == self.config["epochs"]


def read(workdir: epath.Path) -> Result | None:
    """Returns what the run in `workdir` has come to; None where it has not finished an epoch."""
    if not (workdir / "config.json").exists():
        return None
    try:
        drawn = curves.read(workdir, workdir.name)
    except UserError:
        return None
    config = runs.load_config(workdir)
    model = runs.model_as_left(config, workdir)
    return Result(
        config=_without_places(json.loads(config.to_json())),
        epochs=round(drawn.accuracy[0, -1]),
        accuracy=drawn.accuracy.round(6).tolist(),
        loss=mean_of_epochs(drawn.loss).round(4).tolist(),
        split=drawn.split,
        minutes=round(training_seconds(workdir, config.batch_size) / 60, 1),
        parameters=report.count_parameters(abstract_variables(model)["params"]),
        flops=report.paper_flops(model),
    )


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config without what only the machine that ran it has: its folders."""
    return config | {"init_from": epath.Path(config["init_from"]).name, "data": config["data"] | {"dir": ""}}


def mean_of_epochs(curve: np.ndarray) -> np.ndarray:
    """Returns the epochs, from 1, and the mean of the points of a curve that lie in each."""
    numbers = np.ceil(curve[0])
    epochs = np.unique(numbers)
    return np.array([epochs, [curve[1, numbers == epoch].mean() for epoch in epochs]])


def training_seconds(workdir: epath.Path, batch_size: int) -> float:
    """Returns the seconds that a run's steps took, on as many devices as are here."""
    scalars = metrics.read(workdir / "metrics")
    measured = {step: value for step, tag, value in scalars if tag == "images_per_second_per_device"}
    steps, rates = np.array(sorted(measured.items())).reshape(-1, 2).T
    return float(sum(np.diff(steps, prepend=0) * batch_size / jax.device_count() / rates))


def curves_of(result: Result, name: str) -> curves.Curves:
    """Returns the learning curves of a result, which a legend calls `name`."""
    paper = curves.paper_accuracy(ml_collections.ConfigDict(result.config))
    return curves.Curves(name, np.array(result.loss), np.array(result.accuracy), result.split, paper)


def read_record(path: epath.Path) -> dict[str, Result]:
    """Returns the results in a record, by name; none where there is no record yet.

    Raises:
      UserError: it is no record.
    """
    if not path.exists():
        return {}
    try:
        return {name: Result(**fields) for name, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of results ({error}); move it away.") from None


def write_record(path: epath.Path, results: dict[str, Result]) -> None:
    """Writes a record, a line for each run."""
    lines = (f"{json.dumps(name)}: {json.dumps(result._asdict())}" for name, result in sorted(results.items()))
    paths.write(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def changes(result: Result, config: ml_collections.ConfigDict, own: Iterable[str]) -> list[str]:
    """Returns what `config` has otherwise than the config of a result, apart from the fields in `own`, as lines."""
    now = ml_collections.ConfigDict(json.loads(checked(config).to_json()))  # lists in place of tuples, as in the record
    then = ml_collections.ConfigDict(result.config)
    with then.ignore_type():
        then.update_from_flattened_dict({name: value for name, value in flatten(now).items() if name in own})
    return differences(now, then)
