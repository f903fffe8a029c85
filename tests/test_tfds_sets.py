"""Data sets of TensorFlow Datasets: whole, decoded once, never silently another."""

import os
import shutil
import time

import numpy as np
import pytest
from etils import epath
from golden import same

from attn_cnn.errors import UserError
from attn_cnn.training import data

TFDS = epath.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
needs_cifar = pytest.mark.skipif(
    not (TFDS / "cifar10").exists(), reason=f"needs CIFAR-10, which is not in {TFDS} (TFDS_DATA_DIR)"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "svhn_cropped"])
def test_without_data_or_network_the_message_names_the_ways_out(name, tmp_path, monkeypatch):
    builder = type(pytest.importorskip("tensorflow_datasets").builder(name))
    monkeypatch.setattr(builder, "url_infos", {"http://127.0.0.1:9/x": None})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        data.load(name)
    assert time.monotonic() - started < 15
    for word in (name, str(tmp_path / name), "network", "TFDS_DATA_DIR", ":digits"):
        assert word in str(error.value)


@pytest.mark.slow
def test_a_data_set_that_is_nearly_right_is_answered_with_the_one_that_was_meant(tmp_path):
    with pytest.raises(UserError, match="'cifra10', which TensorFlow Datasets does not have; did you mean cifar10?"):
        data.load("cifra10", str(tmp_path))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for data sets, in place of every cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))  # tfds may import matplotlib, which writes there
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """30 and 20 images of noise, which tfds prepared as CIFAR-10, and their labels."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("tiny")
    labels = {"train": rng.integers(0, 10, 30), "test": rng.integers(0, 10, 20)}
    examples = {
        split: [
            (i, {"image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), "label": int(label)})
            for i, label in enumerate(of_split)
        ]
        for split, of_split in labels.items()
    }
    features = {"image": tfds.features.Image(shape=(32, 32, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version="3.0.2",
        features=tfds.features.FeaturesDict(features),
        split_datasets=examples,
        data_dir=str(folder),
        disable_shuffling=True,
    )
    return folder, labels


@pytest.fixture
def tiny_cifar(tiny, folder):
    shutil.copytree(tiny[0] / "cifar10", folder / "cifar10")
    return folder


@needs_cifar
@pytest.mark.slow
def test_cifar_is_whole(folder):
    version = folder / "cifar10" / "3.0.2"
    shutil.copytree(TFDS / "cifar10" / "3.0.2", version)
    for path in (version, *version.iterdir()):
        path.chmod(0o755)
    cifar, spec = data.load("cifar10", str(folder)), data.SPECS["cifar10"]
    assert cifar.train_images.shape == (50_000, 32, 32, 3) and cifar.test_images.shape == (10_000, 32, 32, 3)
    assert cifar.train_images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(cifar.train_labels), np.full(10, 5000))
    np.testing.assert_allclose(
        cifar.train_images.mean((0, 1, 2)) / 255, spec.mean, atol=0.01
    )  # of the original; ours may be recompressed


@pytest.mark.slow
def test_a_data_set_is_decoded_once_and_cached_beside_the_data(tiny, tiny_cifar, caplog):
    caplog.set_level("INFO")
    first = data.load("cifar10", str(tiny_cifar))
    assert first.train_images.shape == (30, 32, 32, 3) and first.test_images.shape == (20, 32, 32, 3)
    assert same((first.train_labels, first.test_labels), tuple(tiny[1].values()))
    assert caplog.text.count("Decoding") == 1
    assert same(first, data.load("cifar10", str(tiny_cifar)))
    assert caplog.text.count("Decoding") == 1
    assert list((tiny_cifar / "cifar10").glob("cifar10-3.0.2-*.npz")) and not (tiny_cifar / "cache").exists()


@pytest.mark.slow
def test_the_cache_moves_to_the_users_folder_where_the_data_is_read_only(tiny_cifar, monkeypatch, caplog):
    caplog.set_level("INFO")
    beside, savez = tiny_cifar / "cifar10", np.savez

    def savez_but_not_beside(file, **arrays):  # root may write to a read-only folder
        if beside == epath.Path(file.name).parent:
            raise PermissionError(file.name)
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", savez_but_not_beside)
    first = data.load("cifar10", str(tiny_cifar))
    assert list((tiny_cifar / "cache" / "attn_cnn").glob("cifar10-3.0.2-*.npz"))
    assert [path.name for path in beside.iterdir()] == ["3.0.2"]
    assert same(first, data.load("cifar10", str(tiny_cifar)))
    assert caplog.text.count("Decoding") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b[:500] + b"\xff" * 9 + b[509:], lambda b: b""],
    ids=["cut", "overwritten", "emptied"],
)
def test_a_damaged_cache_is_decoded_again(damage, tiny_cifar, caplog):
    caplog.set_level("INFO")
    first = data.load("cifar10", str(tiny_cifar))
    (cache,) = (tiny_cifar / "cifar10").glob("*.npz")
    cache.write_bytes(damage(cache.read_bytes()))
    assert same(first, data.load("cifar10", str(tiny_cifar)))
    assert caplog.text.count("Decoding") == 2 and "is damaged" in caplog.text
    assert same(first, data.load("cifar10", str(tiny_cifar)))
    assert caplog.text.count("Decoding") == 2


@pytest.mark.slow
def test_a_data_set_that_was_prepared_anew_is_decoded_anew(tiny_cifar, caplog):
    caplog.set_level("INFO")
    data.load("cifar10", str(tiny_cifar))
    (tiny_cifar / "cifar10" / "3.0.2" / "label.labels.txt").write_text("airplane\n")
    data.load("cifar10", str(tiny_cifar))
    assert caplog.text.count("Decoding") == 2


@pytest.mark.slow
def test_a_damaged_data_set_is_named(tiny_cifar):
    (shard,) = (tiny_cifar / "cifar10" / "3.0.2").glob("*test.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"3\.0\.2 cannot be read.*move the folder away"):
        data.load("cifar10", str(tiny_cifar))


def prepare(folder, name="shapes", file_format=None, size=(6, 5, 3), least=0):
    """Prepares a small data set with tfds, with splits of its own names; returns its images and labels by split."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)
    parts = {
        split: (rng.integers(0, 256, (count, *(s or 4 for s in size)), np.uint8), rng.integers(least, 3, count))
        for split, count in (("train", 12), ("validation", 6))
    }
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=size),
        "label": tfds.features.ClassLabel(names=["circle", "square", "star"]),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: [
                (i, {"id": str(i), "image": x, "label": int(y)}) for i, (x, y) in enumerate(zip(*part, strict=True))
            ]
            for split, part in parts.items()
        },
        data_dir=str(folder),
        disable_shuffling=True,
        **({"file_format": file_format} if file_format else {}),
    )
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_any_data_set_of_images_is_read_in_any_file_format(file_format, folder, caplog):
    parts = prepare(folder, file_format=file_format)
    caplog.set_level("INFO")
    for _ in range(2):
        shapes = data.load("shapes", str(folder), splits=("train", "validation"))
        assert same(shapes[:4], (*parts["train"], *parts["validation"]))
        assert shapes.spec.names == ("circle", "square", "star") and shapes.spec.image_shape == (6, 5, 3)
        pixels = parts["train"][0] / 255
        np.testing.assert_allclose(shapes.spec.mean, pixels.mean((0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(shapes.spec.std, pixels.std((0, 1, 2)), atol=1e-6)
    assert caplog.text.count("Decoding") == 1


@pytest.mark.slow
def test_images_without_labels_are_refused(folder):
    prepare(folder, least=-1)
    with pytest.raises(UserError, match="^the split 'train' of shapes holds images without a label; choose another.$"):
        data.load("shapes", str(folder), splits=("train", "validation"))


@pytest.mark.slow
def test_a_split_that_is_not_there_is_answered_with_those_that_are(folder):
    prepare(folder)
    with pytest.raises(UserError, match="has no split 'test'.*it has train, validation"):
        data.load("shapes", str(folder))


@pytest.mark.slow
def test_images_of_several_sizes_are_refused_with_the_way_to_resize_them(folder):
    prepare(folder, size=(None, None, 3))
    with pytest.raises(UserError, match="not uint8 of one size.*config.data.image_size"):
        data.load("shapes", str(folder), splits=("train", "validation"))
