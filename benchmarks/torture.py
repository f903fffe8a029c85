"""Kills runs at random moments, many times, and looks for anything lost.

    python -m benchmarks.torture            # about 10 minutes on 2 cores
    python -m benchmarks.torture --kills=4  # a taste

Each run is trained once in peace. Then the same command, in another workdir, is killed with SIGKILL again and again
(every second time while a checkpoint is being written), started again each time, and at last left to finish. Its
parameters must be those of the peaceful run to the last bit, and its metrics the same, no step missing or twice.
"""

import os
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
from absl import flags, logging
from etils import epath

import attn_cnn
from attn_cnn import cli
from attn_cnn.training import metrics

KILLS = flags.DEFINE_integer("kills", 60, "Kills in all, spread over the runs.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.")

RUNS = {
    "quadratic": ("configs/quadratic.py:digits", "--config.model.layers=1", "--config.model.hidden_size=16"),
    "learned_query": ("configs/learned_query.py:digits", "--config.model.layers=1", "--config.model.hidden_size=16"),
    "resnet18": ("configs/resnet18.py:digits", "--config.model.width=2", "--config.optimizer.decay_epochs=(40,)"),
}
EPOCHS = 80
TAGS = ("train/loss", "train/accuracy", "lr", "test/loss", "test/accuracy")


def start(name: str, workdir: Path, stderr: int) -> subprocess.Popen:
    """Starts one of `RUNS`; `stderr` says where its log goes."""
    config, *fields = RUNS[name]
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", f"--config.epochs={EPOCHS}"]
    command += ["--config.checkpoint.every_epochs=1", *fields]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=stderr, text=True)


def finish(name: str, workdir: Path) -> str:
    """Starts one of `RUNS`, lets it come to its end, and returns its log."""
    process = start(name, workdir, subprocess.PIPE)
    _, output = process.communicate()
    assert process.returncode == 0, output
    return output


def newest_checkpoint(workdir: Path) -> int:
    """Returns the step of the newest whole checkpoint, or 0."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def unfinished_checkpoints(workdir: Path) -> set[Path]:
    """Returns the folders of checkpoints that are being written, or were left by a kill."""
    return set((workdir / "checkpoints").glob("*tmp*"))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until the `condition` holds or the process ends."""
    while process.poll() is None and not condition():
        time.sleep(0.001)


def wait_for_checkpoint(workdir: Path, process: subprocess.Popen) -> None:
    """Waits until there is a newer checkpoint than now, or the process ends."""
    newest = newest_checkpoint(workdir)
    wait_until(lambda: newest_checkpoint(workdir) > newest, process)


def kill_once(name: str, workdir: Path, while_writing: bool, rng: random.Random) -> bool:
    """Starts the run and kills it, while it starts or after a few checkpoints.

    Returns whether a checkpoint was being written then.
    """
    checkpoints, of_former_kills = rng.randint(0, 2), unfinished_checkpoints(workdir)

    def writing():
        return bool(unfinished_checkpoints(workdir) - of_former_kills)

    process = start(name, workdir, subprocess.DEVNULL)
    for _ in range(checkpoints):
        wait_for_checkpoint(workdir, process)
    if while_writing:
        wait_until(writing, process)
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, 0.5 if checkpoints else 5))  # a few epochs, or what it takes to start
    was_writing = writing()
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"{workdir} was finished before it could be killed; raise EPOCHS"
    return was_writing


def scalars(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns step and value of each time that a metric was written, in order, by its tag."""
    by_tag: dict[str, list[tuple[int, float]]] = {tag: [] for tag in TAGS}
    for step, tag, value in metrics.read(epath.Path(workdir) / "metrics"):
        if tag in by_tag:
            by_tag[tag].append((step, value))
    return by_tag


def torture(name: str, kills: int, rng: random.Random, folder: Path) -> dict[str, int | str]:
    """Returns one run's row of the report."""
    peaceful, tortured = folder / name / "peaceful", folder / name / "tortured"
    finish(name, peaceful)
    during_writes = resumes = 0
    for kill in range(kills):
        during_writes += kill_once(name, tortured, kill % 2 == 1, rng)
        print(f"{name}: kill {kill + 1} of {kills}", file=sys.stderr)
        resumes += newest_checkpoint(tortured) > 0
    output = finish(name, tortured)
    assert "Resuming" in output or "is finished" in output, output
    expected, run = attn_cnn.load_run(peaceful), attn_cnn.load_run(tortured)
    assert run.step == expected.step, f"{tortured} ends at step {run.step} of {expected.step}"
    same = jax.tree.map(np.array_equal, expected.params, run.params)
    wanted, written = scalars(peaceful), scalars(tortured)
    return {
        "run": name,
        "kills": kills,
        "while a checkpoint was written": during_writes,
        "starts from a checkpoint": resumes,
        "parameters that differ": sum(not s for s in jax.tree.leaves(same)),
        "metrics that differ": sum(wanted[tag] != written[tag] for tag in TAGS),
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
    cli.run(main, config=False)
