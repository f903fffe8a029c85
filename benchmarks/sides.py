"""Cost of one paper-scale layer by grid side, 8 to 64: factored, dense and convolution; writes benchmarks/sides.png.

    python -m benchmarks.sides  # about 2 minutes on 2 cores

A layer's values and all its gradients, for 2 images.
"""

import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from absl import app, flags

from attn_cnn.attention import SelfAttention
from benchmarks import common

SIDES = flags.DEFINE_list("sides", ["8", "16", "24", "32", "48", "64"], "Grid sides.")
BATCH = flags.DEFINE_integer("batch", 2, "Images.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each form.")
HEADS, FEATURES = 9, 400


def gradients(layer, output):
    return jax.value_and_grad(lambda params, x: jnp.square(layer.apply(params, x, None, output)).sum(), (0, 1))


def main(_):
    common_fields = {"max_side": 64, "embedding_size": 0, "dropout": 0.0, "dropout_on": "probabilities"}
    layers = {
        form: SelfAttention("quadratic", HEADS, mixing=form, **common_fields) for form in ("dense", "factored")
    } | {"3x3 convolution": common.Convolution("", HEADS, mixing="", dtype=jnp.float32, **common_fields)}
    identity = (jnp.eye(FEATURES), jnp.zeros(FEATURES))
    medians = {name: [] for name in layers}
    for grid in map(int, SIDES.value):
        x = jax.random.normal(jax.random.key(0), (BATCH.value, grid, grid, FEATURES))
        sides = {}
        for name, layer in layers.items():
            params = layer.init(jax.random.key(0), x, None, identity)
            functions = (gradients(layer, identity), gradients(layer.clone(block=sys.maxsize), identity))
            sides[name] = common.function_side(functions[0], params, x, images=BATCH.value, counted=functions[1])
        seconds = common.alternate(sides, ROUNDS.value)
        print(f"\n{grid}x{grid}\n{common.table(sides, seconds, '3x3 convolution')}", flush=True)
        for name in layers:
            medians[name].append(statistics.median(seconds[name]) / BATCH.value * 1e3)

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, values in medians.items():
        axes.plot(list(map(int, SIDES.value)), values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="grid side", ylabel="ms an image, values and gradients")
    axes.set_xticks(list(map(int, SIDES.value)), SIDES.value, minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(__file__).with_name("sides.png"), dpi=150)


if __name__ == "__main__":
    app.run(main)
