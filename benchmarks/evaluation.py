"""Paper-scale evaluation against that of a network with 3x3 convolutions: python -m benchmarks.evaluation"""

from absl import app, flags

from benchmarks import common

GRID = flags.DEFINE_integer("grid", 16, "Side of the grid.")
BATCH = flags.DEFINE_integer("batch", 20, "Images at a time.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Batches of each side.")


def main(_):
    quadratic, learned = (common.paper_run(name, GRID.value, BATCH.value) for name in ("quadratic", "learned"))
    sides = {
        "convolution": common.evaluation_side(quadratic, common.Convolution),
        "quadratic": common.evaluation_side(quadratic),
        "learned": common.evaluation_side(learned),
        "matmul": common.matmul_side(),
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "convolution"))


if __name__ == "__main__":
    app.run(main)
