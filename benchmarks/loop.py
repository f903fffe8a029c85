"""What the training loop costs outside its compiled step, on configs/quadratic.py:digits.

    python -m benchmarks.loop  # about a minute on 2 cores

Stretches of the product's own loop (indices, votes, metrics, log) alternate with as many bare calls of the step.
"""

import statistics
import tempfile

import jax
from absl import app, flags
from etils import epath

from attn_cnn import devices, train
from attn_cnn.interrupt import Interrupt
from attn_cnn.metrics import Writer
from benchmarks import common

ROUNDS = flags.DEFINE_integer("rounds", 30, "Stretches of each kind, of one epoch's 14 steps.")


def main(_):
    run, step, state, (images, labels) = common.real_run("digits")
    config = run.config
    indices, share = devices.replicate(train.EpochOrder(run).batch(0)), devices.share(config.batch_size)

    def bare():
        nonlocal state
        for _ in range(run.steps_per_epoch):
            state, _ = step(state, images, labels, indices, share)
        jax.block_until_ready(state)

    with (
        tempfile.TemporaryDirectory() as folder,
        Writer(epath.Path(folder), 0, True) as writer,
        train.progress(0, run.total_steps) as bar,
    ):
        order, stop = train.EpochOrder(run), train.Stop(Interrupt(), config.batch_size)
        clock, done = train.Clock(config.batch_size), 0

        def looped():
            nonlocal state, done
            for batch in range(1, run.steps_per_epoch + 1):
                state, votes = step(state, images, labels, devices.replicate(order.batch(done)), stop.share())
                stop.agreed(votes)
                done += 1
                clock.tick()
                bar.update()
                if batch % config.log_every_steps == 0 or batch == run.steps_per_epoch:
                    train.check_finite(run, state, None)
                    train.log_window(run, done, state, clock, writer)
            jax.block_until_ready(state)

        sides = {"bare": common.Side(bare), "loop": common.Side(looped)}
        seconds = common.alternate(sides, ROUNDS.value)
    overhead = [loop / bare - 1 for bare, loop in zip(seconds["bare"], seconds["loop"], strict=True)]
    low, _, high = statistics.quantiles(overhead, n=4)
    print(f"a step takes {statistics.median(seconds['bare']) / run.steps_per_epoch * 1e3:.1f} ms")
    print(f"the loop adds {statistics.median(overhead):.2%} (quartiles {low:.2%} and {high:.2%})")


if __name__ == "__main__":
    app.run(main)
