"""The training step: factored attention against a 3x3 convolution in its place, and the dense form.

    python -m benchmarks.step                                 # 16x16, about 3 minutes on 2 cores
    python -m benchmarks.step --grid=32 --rounds=5            # about 8 minutes
    python -m benchmarks.step --grid=64 --batch=2 --rounds=3  # about 3 minutes
    python -m benchmarks.step --scale=small                   # of the laptop recipe, about 2 minutes; or pyramid

Rates are the compiler's FLOPs over the time, beside a float32 product of 2048x2048 matrices in the same run.
"""

from absl import flags

from attn_cnn import cli
from benchmarks import common
from configs import learned, quadratic

SCALE = flags.DEFINE_enum("scale", "paper", ["paper", "small", "pyramid"], "At what scale.")
GRID = flags.DEFINE_integer("grid", 16, "Side of the grid, at the paper's scale.")
BATCH = flags.DEFINE_integer("batch", 20, "Images in a step, at the paper's scale.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Steps of each side.", lower_bound=2)


@flags.multi_flags_validator(["scale", "grid", "batch"], message="--grid and --batch go with --scale=paper alone.")
def laptop_scales_have_their_own_sizes(values):
    return values["scale"] == "paper" or (GRID.default, BATCH.default) == (values["grid"], values["batch"])


def main(_):
    def side(module, **model):
        if SCALE.value == "paper":
            return common.training_side(common.paper_experiment(module, GRID.value, BATCH.value, **model))
        config = module.get_config(SCALE.value)
        config.model.update(**model)
        return common.training_side(common.on_random_images(config))

    sides = {
        "convolution": side(quadratic, layer="convolution"),
        "quadratic": side(quadratic),
        "learned": side(learned),
        "dense": side(quadratic, mixing="dense"),
        "matmul": common.matmul_side(),
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "convolution"))


if __name__ == "__main__":
    cli.run(main, config=False)
