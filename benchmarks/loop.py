"""What the training loop costs outside its compiled step, on configs/quadratic.py:digits.

    python -m benchmarks.loop  # about a minute on 2 cores

Epochs of the loop, without evaluations and checkpoints, alternate with as many bare calls of its step.
"""

import statistics

import jax
from absl import flags, logging

from attn_cnn import cli
from attn_cnn.training import devices
from attn_cnn.training.experiment import random_state
from attn_cnn.training.steps import Inputs
from benchmarks import common
from configs import quadratic

ROUNDS = flags.DEFINE_integer("rounds", 30, "Epochs of each kind, 14 steps each.", lower_bound=2)


def main(_):
    logging.set_verbosity(logging.FATAL)  # orbax tells of its end
    config = quadratic.get_config("digits")
    config.epochs = ROUNDS.value + 1  # one is not counted
    with common.real_loop(config) as loop:
        experiment = loop.experiment
        epochs = common.stretches(experiment, experiment.steps_per_epoch)
        state = devices.replicate(random_state(experiment))
        inputs = Inputs(loop.images, loop.labels, devices.replicate(experiment.batch(0)))

        def bare():
            nonlocal state
            for _ in range(experiment.steps_per_epoch):
                state, _ = loop.step(state, inputs, loop.places)
            jax.block_until_ready(state)

        def looped():
            loop.run(next(epochs))
            jax.block_until_ready(loop.state)

        seconds = common.alternate({"bare": common.Side(bare), "loop": common.Side(looped)}, ROUNDS.value)
    added = [looped / bare - 1 for bare, looped in zip(seconds["bare"], seconds["loop"], strict=True)]
    low, _, high = statistics.quantiles(added, n=4)
    print(f"a step takes {statistics.median(seconds['bare']) / experiment.steps_per_epoch * 1e3:.1f} ms")
    print(f"the loop adds {statistics.median(added):.2%} (quartiles {low:.2%} and {high:.2%})")


if __name__ == "__main__":
    cli.run(main, config=False)
