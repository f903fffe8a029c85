"""Learning curves of several runs together, with the paper's test accuracies where a run is at the paper's scale."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attn_cnn import drawing
from attn_cnn.errors import UserError
from attn_cnn.training import metrics
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment
from attn_cnn.training.runs import load_config

PAPER = {"quadratic": 0.938, "learned": 0.918, "learned_content": 0.871, "resnet18": 0.938}  # test accuracy, table 1
LINES = ("-", ":", "-.")  # the next where colours begin again; dashes are the paper's


class NothingYet(UserError):
    """A run has finished no epoch."""


class Curves(NamedTuple):
    """What a run wrote, by epochs.

    Attributes:
      name: what the legend calls it.
      loss: epochs and training loss.
      accuracy: epochs and accuracy on what the run was evaluated on.
      split: "test" or "validation", what it was evaluated on.
      paper: the paper's test accuracy, for a run at the paper's scale; None: there is none.
    """

    name: str
    loss: Float[np.ndarray, "2 points"]
    accuracy: Float[np.ndarray, "2 points"]
    split: str
    paper: float | None


def read(workdir: epath.Path, name: str) -> Curves:
    """Returns the curves of the run in `workdir`.

    Raises:
      NothingYet: the run has finished no epoch.
      UserError: there is no run.
    """
    config = load_config(workdir)
    experiment = create_experiment(config, workdir_lib.read_spec(workdir), workdir_lib.read_surgery(workdir))
    scalars = metrics.read(workdir / "metrics")

    def curve(tag):
        points = sorted({step: value for step, t, value in scalars if t == tag}.items())
        return np.array([(step / experiment.steps_per_epoch, value) for step, value in points]).reshape(-1, 2).T

    accuracy = curve(f"{experiment.evaluated_on}/accuracy")
    if not accuracy.size:
        raise NothingYet(f"{workdir} has finished no epoch yet: there are no curves to draw.")
    return Curves(name, curve("train/loss"), accuracy, experiment.evaluated_on, paper_accuracy(config))


def paper_accuracy(config: ml_collections.ConfigDict) -> float | None:
    """Returns the paper's test accuracy of what `config` trains, or None where the paper has none at its scale."""
    model = config.model
    scale = config.data.name == "cifar10" and config.epochs == 300
    if model.name == "attention":
        sizes = (model.layers, model.hidden_size, model.mlp_size, model.patch, model.heads, model.layer)
        scale = scale and sizes == (6, 400, 512, 2, 9, "attention") and not model.merge_before
        return PAPER.get(model.encoding) if scale else None
    return PAPER.get(model.name) if scale and (model.width, model.layer) == (64, "convolution") else None


@drawing.styled
def draw(runs: Sequence[Curves]) -> Figure:
    """Draws training loss and accuracy over epochs; the paper's accuracies are dashed."""
    figure, ((left, right),) = drawing.panels(1, 2, 4.0, 3.0)
    for number, run in enumerate(runs):
        turn, colour = divmod(number, len(drawing.COLOURS))
        line = LINES[turn % len(LINES)]
        style = {"color": drawing.COLOURS[colour], "marker": "", "linewidth": 1.5, "linestyle": line}
        left.plot(*run.loss, **style)
        right.plot(*run.accuracy, label=run.name, **style)
        if run.paper is not None:
            right.axhline(run.paper, color=style["color"], linestyle="--", linewidth=1)
            right.annotate(
                f"paper {run.paper:.3f}",
                (1, run.paper),
                xycoords=("axes fraction", "data"),
                fontsize=drawing.SMALL,
                ha="right",
                va="bottom",
                color=style["color"],
            )
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", xlim=(0, None))
    left.set(title="training loss", ylim=(0, None))
    right.set(title=" and ".join(sorted({run.split for run in runs})) + " accuracy")
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)), fontsize=8)
    return figure
