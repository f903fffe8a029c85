"""Every test checks the shapes and types in signatures at run time, and keeps compiled programs where main.py does."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # small programs too: most tests' are

from jaxtyping import install_import_hook

install_import_hook("attn_cnn", "typechecker.check")

import browser
import jax
import pytest

from attn_cnn import paths

if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", os.fspath(paths.cache_folder() / "xla"))


@pytest.fixture(scope="module")
def chromium():
    """The browser, for the tests of the interactive page."""
    with browser.chromium() as opened:
        yield opened
