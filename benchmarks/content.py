"""Content encodings: a paper-scale training step against a straightforward einsum implementation.

python -m benchmarks.content
"""

from absl import app, flags

from benchmarks import common

ENCODING = flags.DEFINE_enum("encoding", "learned_content", ["learned_content", "learned_content_position"], "Which.")
BATCH = flags.DEFINE_integer("batch", 20, "Images in a step.")
ROUNDS = flags.DEFINE_integer("rounds", 4, "Steps of each side.")


def main(_):
    run = common.paper_run("learned_content", 16, BATCH.value, **{"model.encoding": ENCODING.value})
    sides = {
        "einsum": common.training_side(run, common.EinsumAttention),
        ENCODING.value: common.training_side(run),
        "matmul": common.matmul_side(),
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "einsum"))


if __name__ == "__main__":
    app.run(main)
