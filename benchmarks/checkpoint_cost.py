"""What asynchronous checkpoints every epoch cost in throughput, on configs/quadratic.py:small.

    python -m benchmarks.checkpoint_cost  # about 5 minutes on 2 cores

Stretches of 50 steps of the training loop that begin with a checkpoint alternate, in one process, with stretches
without. What a checkpoint adds, the median over pairs of neighbours, is set against an epoch's 500 steps.
"""

import statistics
import time
from collections.abc import Iterable

import jax
from absl import flags, logging

from attn_cnn import cli
from attn_cnn.training.experiment import Next
from attn_cnn.training.loop import Loop
from benchmarks import common
from configs import quadratic

STEPS = 50
PAIRS = flags.DEFINE_integer("pairs", 12, "Stretches with and stretches without a checkpoint.", lower_bound=2)


def seconds(loop: Loop, events: Iterable[tuple[Next, int]]) -> float:
    """Returns how long the loop takes for `events`, to the end of the last step."""
    started = time.perf_counter()
    loop.run(events)
    jax.block_until_ready(loop.state)
    return time.perf_counter() - started


def main(_):
    logging.set_verbosity(logging.FATAL)  # orbax tells of every write
    added, without = [], []
    with common.real_loop(quadratic.get_config("small")) as loop:
        stretches = common.stretches(loop.experiment, STEPS)
        loop.run(next(stretches))
        loop.run([(Next.EVALUATE, STEPS)])  # a checkpoint holds the last test's metrics
        for _ in range(PAIRS.value):
            without.append(seconds(loop, next(stretches)))
            saving = seconds(loop, [(Next.SAVE, int(loop.state.step))])
            added.append(saving + seconds(loop, next(stretches)) - without[-1])
            loop.checkpoints.wait()
            print(
                f"{STEPS} steps {without[-1]:.2f} s; with a checkpoint {added[-1]:+.2f} s, {saving:.2f} s before a step"
            )
    epoch = statistics.median(without) * loop.experiment.steps_per_epoch / STEPS
    cost, (low, _, high) = statistics.median(added), statistics.quantiles(added, n=4)
    print(
        f"a checkpoint adds {cost:.2f} s (quartiles {low:.2f} and {high:.2f}) to an epoch of {epoch:.0f} s: "
        f"{cost / epoch:.2%}"
    )


if __name__ == "__main__":
    cli.run(main, config=False)
