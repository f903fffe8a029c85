"""Kills runs at random moments, many times, and looks for anything lost.

    python -m benchmarks.torture            # about 10 minutes on 2 cores
    python -m benchmarks.torture --kills=4  # a taste

Each run is trained once in peace. Then the same command, in another workdir, is killed with SIGKILL again and again
(every second time while a checkpoint is being written), started again each time, and at last left to finish. Its
parameters must be those of the peaceful run to the last bit, and its metrics the same, no step missing or twice.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tabulate
from absl import app, flags, logging
from etils import epath

from attn_cnn import config as config_lib
from attn_cnn import train
from attn_cnn.checkpoint import Checkpoints
from tests import program

KILLS = flags.DEFINE_integer("kills", 60, "Kills in all, spread over the runs.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.")

RUNS = {
    "quadratic": ("configs/quadratic.py:digits", ("--config.model.layers=1", "--config.model.hidden_size=16")),
    "learned_query": ("configs/learned_query.py:digits", ("--config.model.layers=1", "--config.model.hidden_size=16")),
    "resnet18": ("configs/resnet18.py:digits", ("--config.model.width=2", "--config.optimizer.decay_epochs=(40,)")),
}
EPOCHS = 80
TAGS = ("train/loss", "train/accuracy", "lr", "test/loss", "test/accuracy")


def arguments(workdir: Path, extra: tuple[str, ...]) -> tuple[str, ...]:
    return (f"--workdir={workdir}", f"--config.epochs={EPOCHS}", "--config.checkpoint.every_epochs=1", *extra)


def unfinished_checkpoints(workdir: Path) -> set[Path]:
    """Folders of checkpoints being written, or left by a kill."""
    return set((workdir / "checkpoints").glob("*tmp*"))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Or until the process ends."""
    while process.poll() is None and not condition():
        time.sleep(0.001)


def kill_once(config: str, flags_: tuple[str, ...], workdir: Path, while_writing: bool, rng: random.Random) -> bool:
    """Starts the run and kills it, while it starts or after a few checkpoints; True if one was being written then."""
    checkpoints, of_former_kills = rng.randint(0, 2), unfinished_checkpoints(workdir)

    def writing():
        return bool(unfinished_checkpoints(workdir) - of_former_kills)

    process = program.start(*flags_, config=config, tiny=False)
    for _ in range(checkpoints):
        newest = program.newest_checkpoint(workdir)
        wait_until(lambda newest=newest: program.newest_checkpoint(workdir) > newest, process)
    if while_writing:
        wait_until(writing, process)
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, 0.5 if checkpoints else 5))  # a few epochs, or what it takes to start
    was_writing = writing()
    process.kill()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, f"{workdir} was finished before it could be killed; raise EPOCHS"
    return was_writing


def final_params(workdir: Path) -> dict:
    config = config_lib.load(epath.Path(workdir) / "config.json")
    run = train.create_run(config)
    with Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        step, state = checkpoints.restore(train.abstract_state(run))
    assert step == run.total_steps, f"{workdir} ends at step {step} of {run.total_steps}"
    return state.params


def torture(name: str, kills: int, rng: random.Random, folder: Path) -> dict[str, int | str]:
    """One run's row of the report."""
    config, extra = RUNS[name]
    peaceful, tortured = folder / name / "peaceful", folder / name / "tortured"
    program.run(*arguments(peaceful, extra), config=config, tiny=False, timeout=3600)
    during_writes = resumes = 0
    flags_ = arguments(tortured, extra)
    for kill in range(kills):
        during_writes += kill_once(config, flags_, tortured, kill % 2 == 1, rng)
        print(f"{name}: kill {kill + 1} of {kills}", file=sys.stderr)
        resumes += program.newest_checkpoint(tortured) > 0
    output = program.run(*flags_, config=config, tiny=False, timeout=3600).stderr
    assert "Resuming" in output or "is finished" in output, output
    same = jax.tree.map(np.array_equal, final_params(peaceful), final_params(tortured))
    metrics = [program.scalars(peaceful, tag) == program.scalars(tortured, tag) for tag in TAGS]
    return {
        "run": name,
        "kills": kills,
        "while a checkpoint was written": during_writes,
        "starts from a checkpoint": resumes,
        "parameters that differ": sum(not s for s in jax.tree.leaves(same)),
        "metrics that differ": sum(not m for m in metrics),
    }


def main(_):
    logging.set_verbosity(logging.FATAL)  # orbax tells of every restore
    rng = random.Random(SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in RUNS:
            rows.append(torture(name, KILLS.value // len(RUNS), rng, Path(folder)))
            print(tabulate.tabulate(rows, headers="keys", tablefmt="github"), flush=True)
    if any(row["parameters that differ"] or row["metrics that differ"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
