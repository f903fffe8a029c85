"""Devices share a batch: every image has one place, whatever the sizes, and what is missing at the end is no image."""

import math

import jax
import numpy as np
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
