"""The paper-scale training step: factored attention against a 3x3 convolution in its place, and the dense form.

    python -m benchmarks.step                                 # 16x16, about 3 minutes on 2 cores
    python -m benchmarks.step --grid=32 --rounds=5            # about 8 minutes
    python -m benchmarks.step --grid=64 --batch=2 --rounds=3  # about 3 minutes

Rates are the compiler's FLOPs over the time, beside a float32 product of 2048x2048 matrices in the same run.
"""

from absl import app, flags

from benchmarks import common
from configs import learned, quadratic

GRID = flags.DEFINE_integer("grid", 16, "Side of the grid.")
BATCH = flags.DEFINE_integer("batch", 20, "Images in a step.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Steps of each side.", lower_bound=2)


def main(_):
    def side(config, **model):
        return common.training_side(common.paper_experiment(config, GRID.value, BATCH.value, **model))

    sides = {
        "convolution": side(quadratic, layer="convolution"),
        "quadratic": side(quadratic),
        "learned": side(learned),
        "dense": side(quadratic, mixing="dense"),
        "matmul": common.matmul_side(),
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "convolution"))


if __name__ == "__main__":
    app.run(main)
