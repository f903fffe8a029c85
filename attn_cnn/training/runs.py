"""Runs as they lie in their workdirs: the config, a checkpoint, the heads that are left."""

from typing import Any, NamedTuple

import flax.linen as nn
import ml_collections
from etils import epath

from attn_cnn import model as model_lib
from attn_cnn.errors import UserError
from attn_cnn.heads import surgery as surgery_lib
from attn_cnn.training import checkpoint, devices
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.dataset import Spec
from attn_cnn.training.experiment import Experiment, TrainState, abstract_state, checked, create_experiment


def load_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """Returns the config of the run in `workdir`, with defaults for fields that came after it.

    Raises:
      UserError: there is no run, or its config was damaged or changed.
    """
    path = workdir / workdir_lib.CONFIG
    if not path.exists():
        raise UserError(f"{workdir} holds no run; train one first, or name the workdir of one.")
    config = workdir_lib.read_config(path)
    try:
        return checked(config)
    except UserError as error:
        raise UserError(f"{path} was changed: {error}") from None


class Run(NamedTuple):
    """A run as it is found in its workdir.

    Attributes:
      model: the Flax module.
      params: its parameters.
      batch_stats: the ResNet's running statistics, else {}.
      config: the run's config, its model with the heads that remain.
      mean: mean of each channel of the images, scaled to [0, 1], for `augment.normalize`.
      std: standard deviation of each channel.
      step: steps that were done.
      spec: what else is known of the run's data: the classes' names, the number of images.
    """

    model: nn.Module
    params: Any
    batch_stats: Any
    config: ml_collections.ConfigDict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    spec: Spec

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to; as an argument of a compiled function it is not folded into it."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def load_run(workdir: epath.PathLike, step: int | str = "newest") -> Run:
    """Opens the run in `workdir`; nothing there changes.

    Args:
      workdir: the folder of a run.
      step: "newest", "best" (by accuracy on the test set, or on what is held out), or the step of a checkpoint.

    Raises:
      UserError: there is no run, or no such checkpoint of it, or it cannot be read.
    """
    workdir = workdir_lib.open_workdir(workdir)
    experiment = create_experiment(
        load_config(workdir), workdir_lib.read_spec(workdir), workdir_lib.read_surgery(workdir)
    )
    step, state = restore(experiment, workdir, step)
    config = experiment.config.copy_and_resolve_references()
    with config.ignore_type():
        config.model = experiment.model_config
    return Run(
        model=model_lib.create_model(config.model, config.dtype),
        params=state.params,
        batch_stats=state.batch_stats,
        config=config,
        mean=experiment.spec.mean,
        std=experiment.spec.std,
        step=step,
        spec=experiment.spec,
    )


def restore(experiment: Experiment, workdir: epath.Path, step: int | str = "newest") -> tuple[int, TrainState]:
    """Reads a checkpoint of the run in `workdir`; nothing there changes.

    Raises:
      UserError: there is none, or none that can be read.
    """
    with checkpoint.Checkpoints(workdir / workdir_lib.CHECKPOINTS, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract_state(experiment), step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train until its first one.")
    return restored


def as_left(experiment: Experiment, workdir: epath.Path) -> Experiment:
    """Returns the experiment with the heads that the run in `workdir` has left."""
    surgery = devices.on_every_host(lambda: workdir_lib.read_surgery(workdir))
    return create_experiment(experiment.config, experiment.spec, surgery) if surgery else experiment


def model_as_left(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """Returns the config's model with the heads that the run in `workdir` has left, where it is a run of that model."""
    config, workdir = checked(config), workdir_lib.open_workdir(workdir)
    surgery = workdir_lib.read_surgery(workdir)
    same = surgery and not workdir_lib.differences(config, load_config(workdir), only=("model.",))
    return surgery_lib.with_remaining_heads(config.model, surgery) if same else config.model
