"""TensorFlow, kept quiet and off the accelerators; it reads tfds's files and writes event files.

It is imported late, since that takes seconds.
"""

import contextlib
import os
from types import ModuleType

# Set here and not in `load`, since TensorBoard may import TensorFlow first. TensorFlow tells of oneDNN whatever the log
# level, and here only reads files.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def load() -> ModuleType:
    """Returns TensorFlow without its start-up messages, and off the accelerators, which are JAX's."""
    import tensorflow

    with contextlib.suppress(RuntimeError):  # a notebook has used TensorFlow before
        tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow
