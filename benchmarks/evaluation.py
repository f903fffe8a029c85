"""Paper-scale evaluation: factored attention against a 3x3 convolution in its place.

python -m benchmarks.evaluation  # about a minute on 2 cores
"""

from absl import flags

from attn_cnn import cli
from benchmarks import common
from configs import learned, quadratic

GRID = flags.DEFINE_integer("grid", 16, "Side of the grid.")
BATCH = flags.DEFINE_integer("batch", 20, "Images at a time.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Batches of each side.", lower_bound=2)


def main(_):
    def side(config, **model):
        return common.evaluation_side(common.paper_experiment(config, GRID.value, BATCH.value, **model))

    sides = {
        "convolution": side(quadratic, layer="convolution"),
        "quadratic": side(quadratic),
        "learned": side(learned),
        "matmul": common.matmul_side(),
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "convolution"))


if __name__ == "__main__":
    cli.run(main, config=False)
