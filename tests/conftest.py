"""Shapes and types in signatures are checked at run time in every test."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

install_import_hook("attn_cnn", "typechecker.check")
