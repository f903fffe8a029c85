"""Small models that the paper's PyTorch code evaluated in float64: one .npz for each encoding."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

FOLDER = Path(__file__).parent / "golden"
ENCODINGS = sorted(path.stem for path in FOLDER.glob("*.npz"))
TOLERANCE = 1e-5


class Golden:
    def __init__(self, encoding: str):
        self.arrays = np.load(FOLDER / f"{encoding}.npz")
        self.settings = json.loads(str(self.arrays["config"]))
        self.images = jnp.asarray(self.arrays["images"].transpose(0, 2, 3, 1))
        self.labels = self.arrays["labels"]
        self.encoding = encoding

    def state_dict(self, prefix: str = "state/") -> dict[str, np.ndarray]:
        names = [name for name in self.arrays.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.arrays[name] for name in names}

    def model(self, mixing: str = "auto", **changes) -> ml_collections.ConfigDict:
        settings = self.settings
        fields = {
            "name": "attention",
            "encoding": self.encoding,
            "mixing": mixing,
            "image_shape": self.images.shape[1:],
            "classes": settings["num_classes"],
            "layers": settings["num_hidden_layers"],
            "heads": settings["num_attention_heads"],
            "hidden_size": settings["hidden_size"],
            "mlp_size": settings["intermediate_size"],
            "patch": settings["pooling_concatenate_size"],
            "max_side": settings["max_position_embeddings"],
            "embedding_size": 0,
            "share_tables": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "attention_dropout_on": "probabilities",
        }
        return ml_collections.ConfigDict(fields | changes)


def small_model(encoding: str, **changes) -> ml_collections.ConfigDict:
    """Returns a model as small as the golden ones, of any encoding."""
    return Golden("quadratic").model(encoding=encoding, **changes)


def flat(params):
    """Returns parameters by their paths, as in "layer_0/attention/value/kernel"."""
    return traverse_util.flatten_dict(params, sep="/")


def same(a, b):
    """Returns whether two data sets, or tuples of arrays, are the same."""
    return all(np.array_equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) and a[4:] == b[4:]


def assert_close(actual, expected, what="", tolerance=TOLERANCE):
    """Asserts that the largest difference is within `tolerance` of the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{what}: off by {error:.2e} of {scale:.2e}"


def assert_trees_close(actual, expected, tolerance=TOLERANCE):
    """Asserts that two pytrees are alike and their arrays close, each array by itself."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert_close(ours, theirs, jax.tree_util.keystr(path), tolerance)
