"""A run without some of its heads, made by hand: what is left of it stays as it is, and goes on."""

from collections.abc import Mapping

from etils import epath

from attn_cnn.errors import UserError
from attn_cnn.heads import surgery as surgery_lib
from attn_cnn.model import has_heads
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment
from attn_cnn.training.runs import load_config, restore


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
    there = surgery_lib.numbers_of_heads(experiment.model_config)
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
