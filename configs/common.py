"""What the experiments share: the paper's run on one page, and what smaller scales change in it.

A scale is named after a colon, as in configs/quadratic.py:digits. Any field is set on the command line, as in
--config.optimizer.learning_rate=0.05.
"""

import ml_collections

from attn_cnn.encodings import encoding_class
from attn_cnn.errors import UserError
from attn_cnn.schema import one_or_each

# CIFAR-10 on a laptop, as docs/recipe.md found it.
SMALL_RUN = {
    "epochs": 12,
    "label_smoothing": 0.1,
    "optimizer.name": "muon",
    "optimizer.learning_rate": 0.01,
    "optimizer.momentum": 0.95,
    "optimizer.weight_decay": 0.05,
}
SMALL = SMALL_RUN | {
    "model.layers": 4,
    "model.hidden_size": 96,
    "model.mlp_size": 192,
    "model.patch": 4,
    "model.max_side": 8,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
}
# The same with a grid that halves between layers: 16x16, 8x8, 4x4. It is ours, not the paper's.
PYRAMID = SMALL_RUN | {
    "model.layers": 3,
    "model.hidden_size": (64, 128, 256),
    "model.mlp_size": (128, 256, 512),
    "model.merge_before": (1, 2),
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
}
# On a laptop, heads whose centers can start on a convolution's window do: from a random start they need longer.
WINDOW = {"init": "grid", "init_spread": 2.5}
# Scores of a query grow with two kernels at once, and at 0.01 Muon lets them grow beyond what softmax can learn from. A
# step takes up to twice as long: with half the epochs these networks are trained in the time of the others.
QUERY = {"epochs": 6, "optimizer.learning_rate": 0.003}

# scikit-learn's digits: no download.
DIGITS_RUN = {
    "epochs": 60,
    "data.name": "digits",
    "data.crop_padding": 1,
    "data.flip": False,
    "optimizer.name": "adam",  # with 1,437 digits SGD is 1% less accurate after the same 60 epochs
    "optimizer.learning_rate": 0.003,
    "checkpoint.every_epochs": 10,
    "model.image_shape": (8, 8, 1),
}
DIGITS = DIGITS_RUN | {
    "model.layers": 3,
    "model.hidden_size": 64,
    "model.mlp_size": 128,
    "model.max_side": 4,
    "model.attention_dropout": 0.0,  # 0.1 of 16 pixels costs 1% accuracy
}

SCALES = {"": {}, "small": SMALL, "pyramid": PYRAMID, "digits": DIGITS}
LAPTOP = ("small", "pyramid")
MEANING = {
    "small": "CIFAR-10 on a laptop",
    "pyramid": "the same with a grid that halves between layers",
    "digits": "no download",
}


def attention(scale: str, encoding: str) -> ml_collections.ConfigDict:
    """Returns the paper's attention model with one of `attn_cnn.encodings.ENCODINGS`, at a scale."""
    config = run()
    config.model = ml_collections.ConfigDict(
        {
            "name": "attention",
            "image_shape": (32, 32, 3),
            "classes": 10,
            "patch": 2,  # 2x2 pixels are one pixel of the grid
            "layers": 6,
            "layer": one_or_each("attention"),  # or convolution
            "kernel_size": 3,  # of layers that are convolutions
            "encoding": encoding,
            "heads": one_or_each(9),
            "init": "random",  # or grid: quadratic heads start as a convolution's window; or impulse: anywhere in it
            "init_spread": 2**0.5,  # of heads that start in a window
            "content_init": "random",  # or mimetic: products of query and key near a multiple of the identity
            "max_side": 16,  # of the grid that learned tables cover
            "embedding_size": 0,  # of learned tables; 0: what the encoding calls for
            "share_tables": False,  # between layers
            "mixing": "auto",  # or dense, or factored: an error where it is not exact
            "hidden_size": one_or_each(400),
            "mlp_size": one_or_each(512),
            "merge_before": (),  # layers, from 0, before which 2x2 pixels of the grid become one
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "attention_dropout_on": "probabilities",  # or factors, which keeps mixing factored in training
        }
    )
    config = at_scale(config, scale, SCALES)
    if scale in LAPTOP and "init" in encoding_class(encoding).reads:
        config.model.update(WINDOW)
    if scale in LAPTOP and encoding_class(encoding).needs_x:
        config.update_from_flattened_dict(QUERY)
    return config


DATA = {
    "name": "cifar10",  # or another of TensorFlow Datasets, digits, folder:PATH, npz:PATH
    "dir": "",  # TFDS_DATA_DIR, or tfds's default
    "train_split": "train",
    "test_split": "test",
    "image_size": 0,  # to which pictures of a folder are resized; 0: they are of one size
    "train_fraction": 1.0,  # of each class, after what is held out
    "validation_fraction": 0.0,  # of each class, held out of the training set to choose by
    "crop_padding": 4,
    "flip": True,
}


def run() -> ml_collections.ConfigDict:
    """Returns the paper's training of an attention model, all but the model itself."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "epochs": 300,
            "batch_size": 100,
            "eval_batch_size": 100,  # on each device
            "micro_batch_size": 0,  # images, on all devices, whose gradients are computed at once; 0: all of the batch
            "log_every_steps": 10,
            "dtype": "float32",  # or bfloat16, of the computation
            "matmul_precision": "default",  # or high, highest: of float32 products on accelerators
            "label_smoothing": 0.0,  # share of a label that is spread over all classes
            "condition_penalty": 0.0,  # on (condition number - 1)^2 of the heads of quadratic_generalized
            "init_from": "",  # the workdir of a run to start from
            "init_except": (),  # its parameters that start afresh, as in ("classifier",)
            "degenerate_heads": "keep",  # of that run; or prune, or reset: drawn anew
            "freeze": "none",  # or positions, values, both: of the heads that init_from brings, without it of all
            "data": DATA,
            "optimizer": {
                "name": "sgd",  # or adam, muon
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "schedule": "cosine",  # or step: a tenth after each of decay_epochs
                "warmup": 0.05,  # of all steps
                "decay_epochs": (),
            },
            "checkpoint": {
                "every_epochs": 1,
                "keep": 3,  # the newest; the best stays as well
                "history_epochs": 0,  # every so many epochs one is kept for good; 0: none
            },
            "figures": {"every_epochs": 0},  # where heads look, drawn for TensorBoard; 0: never
        }
    )


def at_scale(config: ml_collections.ConfigDict, scale: str, scales: dict[str, dict]) -> ml_collections.ConfigDict:
    """Returns `config` with the fields that `scale` changes."""
    if scale not in scales:
        smaller = ", ".join(f"':{name}' ({MEANING[name]})" for name in scales if name)
        raise UserError(f"unknown scale {scale!r}; the scales are: none (the paper), {smaller}.")
    config.update_from_flattened_dict(scales[scale])
    return config
