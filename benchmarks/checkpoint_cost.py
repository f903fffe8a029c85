"""What asynchronous checkpoints every epoch cost in throughput, on configs/quadratic.py:small.

    python -m benchmarks.checkpoint_cost  # about 12 minutes on 2 cores

Epochs with a checkpoint written at their beginning alternate, in one process, with epochs without.
"""

import functools
import statistics
import tempfile
import time

import jax
from absl import app, flags
from etils import epath

from attn_cnn import data, devices, train
from attn_cnn.checkpoint import Checkpoints
from attn_cnn.interrupt import Interrupt
from configs import quadratic

PAIRS = flags.DEFINE_integer("pairs", 3, "Epochs with and epochs without a checkpoint.")


def main(_):
    config = quadratic.get_config("small")
    run = train.create_run(config)
    dataset = data.load(config.data.name)
    images, labels = devices.replicate((dataset.train_images, dataset.train_labels))
    step = devices.mapped(functools.partial(train.train_step, run=run), arguments=5, donate=(0,))
    state = devices.replicate(train.create_state(run))
    order, stop = train.EpochOrder(run), train.Stop(Interrupt(), config.batch_size)
    done = 0

    def epoch(steps: int) -> float:
        nonlocal state, done
        started = time.perf_counter()
        for _ in range(steps):
            state, votes = step(state, images, labels, devices.replicate(order.batch(done)), stop.share())
            stop.agreed(votes)
            done += 1
        jax.block_until_ready(state)
        return time.perf_counter() - started

    epoch(20)
    ratios = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(epath.Path(folder) / "checkpoints", 3) as checkpoints:
        for _ in range(PAIRS.value):
            without = epoch(run.steps_per_epoch)
            started = time.perf_counter()
            checkpoints.save(done, state, {"test_accuracy": 0.0})
            saving = time.perf_counter() - started
            with_one = saving + epoch(run.steps_per_epoch)
            checkpoints.wait()
            ratios.append(with_one / without)
            print(f"without {without:.1f} s, with {with_one:.1f} s, of which {saving:.2f} s before the first step")
    print(f"cost of a checkpoint every epoch: {100 * (statistics.median(ratios) - 1):.2f}% (median of {len(ratios)})")


if __name__ == "__main__":
    app.run(main)
