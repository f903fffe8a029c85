"""Data sets: whole, decoded once, never silently another."""

import os
import shutil
import time

import numpy as np
import pytest
from etils import epath

from attn_cnn import data
from attn_cnn.errors import UserError

TFDS = epath.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
needs_cifar = pytest.mark.skipif(
    not (TFDS / "cifar10").exists(), reason=f"needs CIFAR-10, which is not in {TFDS} (TFDS_DATA_DIR)"
)


def test_digits_are_split_in_fixed_strata():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1) and digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8 and digits.train_images.max() == 255
    shares = [np.bincount(labels) / len(labels) for labels in (digits.train_labels, digits.test_labels)]
    np.testing.assert_allclose(*shares, atol=2e-3)
    again = data.load("digits")
    assert all(np.array_equal(a, b) for a, b in zip(digits, again, strict=True))


def test_what_is_written_of_the_digits_is_true():
    digits, spec = data.load("digits"), data.SPECS["digits"]
    assert spec.train_size == len(digits.train_labels)
    assert spec.image_shape == digits.train_images.shape[1:]
    assert spec.mean == pytest.approx([digits.train_images.mean() / 255], abs=1e-4)
    assert spec.std == pytest.approx([digits.train_images.std() / 255], abs=1e-4)


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    orders = [data.epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], data.epoch_order(0, 0, 1000))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_data_or_network_the_message_names_the_ways_out(name, tmp_path, monkeypatch):
    monkeypatch.setitem(
        data.SPECS,
        name,
        data.SPECS[name].__class__(**vars(data.SPECS[name]) | {"url": "http://127.0.0.1:9/x"}),
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        data.load(name)
    assert time.monotonic() - started < 15
    for word in (name, str(tmp_path / name), "network", "TFDS_DATA_DIR", ":digits"):
        assert word in str(error.value)


@pytest.fixture
def copy_of_cifar(tmp_path, monkeypatch):
    """CIFAR-10's test split alone, twice, in a folder that can be written."""
    version = tmp_path / "cifar10" / "3.0.2"
    shutil.copytree(TFDS / "cifar10" / "3.0.2", version)
    for path in (version, *version.iterdir()):
        path.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))  # tfds may import matplotlib, which writes there
    return tmp_path


@needs_cifar
def test_cifar_is_decoded_once_and_cached_beside_the_data(copy_of_cifar, monkeypatch):
    first = data.load("cifar10", str(copy_of_cifar))
    assert first.train_images.shape == (50_000, 32, 32, 3) and first.test_images.shape == (10_000, 32, 32, 3)
    assert first.train_images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(first.train_labels), np.full(10, 5000))
    spec = data.SPECS["cifar10"]
    np.testing.assert_allclose(
        first.train_images.mean((0, 1, 2)) / 255, spec.mean, atol=0.01
    )  # of the original; ours may be recompressed

    monkeypatch.setattr(data, "_decode", lambda _: pytest.fail("decoded again"))
    started = time.monotonic()
    second = data.load("cifar10", str(copy_of_cifar))
    assert time.monotonic() - started < 2
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert list((copy_of_cifar / "cifar10").glob("*.npz")) and not (copy_of_cifar / "cache").exists()


@needs_cifar
def test_the_cache_moves_to_the_users_folder_where_the_data_is_read_only(copy_of_cifar, monkeypatch):
    dataset = data.Dataset(*(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int32)) * 2)
    monkeypatch.setattr(data, "_decode", lambda _: dataset)
    write = data._write_cache
    beside = copy_of_cifar / "cifar10"
    monkeypatch.setattr(data, "_write_cache", lambda place, d: place.parent != beside and write(place, d))
    data.load("cifar10", str(copy_of_cifar))
    assert list((copy_of_cifar / "cache" / "attn_cnn").glob("cifar10-3.0.2-*.npz"))
    assert not list(beside.glob("*.npz"))


@needs_cifar
def test_a_damaged_cache_is_decoded_again(copy_of_cifar, monkeypatch, caplog):
    dataset = data.Dataset(*(np.zeros((9, 9, 9, 9), np.uint8), np.zeros(9, np.int32)) * 2)
    decoded = []
    monkeypatch.setattr(data, "_decode", lambda _: (decoded.append(1), dataset)[1])
    data.load("cifar10", str(copy_of_cifar))
    (cache,) = (copy_of_cifar / "cifar10").glob("*.npz")
    for damage in (lambda b: b[: len(b) // 2], lambda b: b[:500] + b"\xff" * 9 + b[509:], lambda b: b""):
        cache.write_bytes(damage(cache.read_bytes()))
        again = data.load("cifar10", str(copy_of_cifar))
        assert all(np.array_equal(a, b) for a, b in zip(dataset, again, strict=True))
    assert len(decoded) == 4 and "damaged" in caplog.text


@needs_cifar
def test_a_damaged_data_set_is_named(copy_of_cifar):
    (shard,) = (copy_of_cifar / "cifar10" / "3.0.2").glob("*test.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"3\.0\.2 is damaged.*prepare it again"):
        data.load("cifar10", str(copy_of_cifar))
