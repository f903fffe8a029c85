"""Devices share a batch: every image has one place, whatever the sizes, and what is missing at the end is no image."""

import math
import subprocess

import jax
import numpy as np
import program
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_cnn.training import devices


@given(st.integers(1, 300), st.integers(1, 20))
def test_every_place_of_a_batch_is_some_devices_once(batch, pieces):
    places = np.asarray(devices.shares(batch, pieces))
    share = math.ceil(batch / (jax.device_count() * pieces))
    assert places.shape[0] == jax.local_device_count() and places.shape[1] <= pieces and places.shape[2] == share
    np.testing.assert_array_equal(np.sort(places[places >= 0]), np.arange(batch))
    assert (places[places < 0] == -1).all()


SHARDED = """
import runpy, sys
from attn_cnn.training import devices
devices.PMAP = False
sys.argv = sys.argv[1:]
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
def test_shard_map_gives_the_bits_of_pmap_on_4_devices(tmp_path):
    config = "configs/resnet18.py:digits"  # whose batch statistics cross devices, too
    sizes = ("--config.model.width=2", "--config.optimizer.decay_epochs=()", "--config.epochs=1")
    sizes = (*sizes, "--config.batch_size=90")  # shares of 23, the last of 21
    program.run(*sizes, f"--workdir={tmp_path}/pmap", config=config, tiny=False, devices=4)
    python, *command = program.command(*sizes, f"--workdir={tmp_path}/shard_map", config=config, tiny=False)
    subprocess.run([python, "-c", SHARDED, *command], cwd=program.ROOT, env=program.environment(4), check=True)
    for tag in ("train/loss", "test/loss", "test/accuracy"):
        pmap, shard_map = (program.scalars(tmp_path / name, tag) for name in ("pmap", "shard_map"))
        assert pmap and shard_map == pmap
