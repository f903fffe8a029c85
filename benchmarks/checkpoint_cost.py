"""What asynchronous checkpoints every epoch cost in throughput, on configs/quadratic.py:small.

    python -m benchmarks.checkpoint_cost  # about 5 minutes on 2 cores

Stretches of 50 steps with a checkpoint written during them alternate, in one process, with stretches without. What a
checkpoint adds, the median over pairs of neighbours, is set against an epoch's 500 steps.
"""

import statistics
import tempfile
import time

import jax
from absl import app, flags, logging
from etils import epath

from attn_cnn import devices, train
from attn_cnn.checkpoint import Checkpoints
from attn_cnn.interrupt import Interrupt
from benchmarks import common

STEPS = 50
PAIRS = flags.DEFINE_integer("pairs", 12, "Stretches with and stretches without a checkpoint.")


def main(_):
    logging.set_verbosity(logging.FATAL)  # orbax tells of every write
    run, step, state, (images, labels) = common.real_run("small")
    order, stop = train.EpochOrder(run), train.Stop(Interrupt(), run.config.batch_size)
    done = 0

    def stretch() -> float:
        """Seconds that STEPS steps take."""
        nonlocal state, done
        started = time.perf_counter()
        for _ in range(STEPS):
            state, votes = step(state, images, labels, devices.replicate(order.batch(done)), stop.share())
            stop.agreed(votes)
            done += 1
        jax.block_until_ready(state)
        return time.perf_counter() - started

    stretch()
    added, without = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(epath.Path(folder) / "checkpoints", 3) as checkpoints:
        for _ in range(PAIRS.value):
            without.append(stretch())
            started = time.perf_counter()
            checkpoints.save(done, state, {"test_accuracy": 0.0})
            saving = time.perf_counter() - started
            added.append(saving + stretch() - without[-1])
            checkpoints.wait()
            print(
                f"{STEPS} steps {without[-1]:.2f} s; with a checkpoint {added[-1]:+.2f} s, {saving:.2f} s before a step"
            )
    epoch = statistics.median(without) * run.steps_per_epoch / STEPS
    cost = statistics.median(added)
    quartiles = statistics.quantiles(added, n=4)
    print(
        f"a checkpoint adds {cost:.2f} s (quartiles {quartiles[0]:.2f} and {quartiles[2]:.2f}) to an epoch of "
        f"{epoch:.0f} s: {100 * cost / epoch:.2f}%"
    )


if __name__ == "__main__":
    app.run(main)
