"""Data of one's own: arrays in a file, folders of pictures; each trains a run, and mistakes are named."""

import json
import shutil
import sys

import numpy as np
import PIL.Image
import program
import pytest
from etils import epath

from attn_cnn import load_run, predict, train
from attn_cnn.errors import UserError
from attn_cnn.training import data, metrics
from attn_cnn.training.pictures import read

NAMES = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def colours(count, seed, size=(8, 8)):
    """Noisy pictures that are blue, green or red, and which."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 100, (count, *size, 3)).astype(np.uint8)
    images[np.arange(count), :, :, 2 - labels] += 150
    return images, labels


def write_folder(root, train_count=30, test_count=12, size=(8, 8), mode="RGB", kind="png"):
    for split, (images, labels) in (("train", colours(train_count, 0, size)), ("test", colours(test_count, 1, size))):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / NAMES[label] / f"{i:03}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).convert(mode).save(path)
    return root


def write_arrays(path, **changes):
    (train_images, train_labels), (test_images, test_labels) = colours(30, 0), colours(12, 1)
    arrays = {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }
    np.savez(path, **arrays | changes)
    return path


def own_config(name, **changes):
    changes = {"model.image_shape": (8, 8, 3), "model.classes": 3, "batch_size": 10, "epochs": 12} | changes
    return program.tiny_config(**{"data.name": name, "checkpoint.every_epochs": 12, "data.crop_padding": 0} | changes)


def test_digits_without_scikit_learn_are_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        data.load("digits")


def test_a_folder_of_pictures_is_read_with_its_classes_in_order(tmp_path):
    root = write_folder(tmp_path / "my pictures")
    colour = data.load(f"folder:{root}")
    assert colour.spec.names == NAMES and colour.spec.image_shape == (8, 8, 3) and colour.spec.train_size == 30
    images, labels = colours(30, 0)
    order = np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(colour.train_images, images[order])
    np.testing.assert_array_equal(colour.train_labels, labels[order])
    assert np.bincount(colour.test_labels).tolist() == [4, 4, 4]


def test_a_folder_is_decoded_once_and_anew_when_a_picture_changes(tmp_path, caplog):
    caplog.set_level("INFO")
    root = write_folder(tmp_path / "pictures")
    first = data.load(f"folder:{root}")
    np.testing.assert_array_equal(first.train_images, data.load(f"folder:{root}").train_images)
    assert caplog.text.count("Decoding") == 1
    PIL.Image.new("RGB", (8, 8), "white").save(root / "train" / "blue" / "000.png")
    assert data.load(f"folder:{root}").train_images[0].min() == 255
    assert caplog.text.count("Decoding") == 2


def test_pictures_are_resized_where_a_size_is_asked_for_just_as_predictions_are(tmp_path):
    root = write_folder(tmp_path / "pictures", size=(20, 13))
    colour = data.load(f"folder:{root}", image_size=8)
    assert colour.spec.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(
        colour.train_images[0], read(epath.Path(root / "train" / "blue" / "000.png"), (8, 8, 3))
    )


def test_pictures_of_several_sizes_are_named_with_the_field_that_resizes_them(tmp_path):
    root = write_folder(tmp_path / "pictures")
    PIL.Image.new("RGB", (5, 7)).save(root / "test" / "red" / "odd.png")
    with pytest.raises(UserError, match=r"000.png is 8x8 and .*odd.png 7x5; set config.data.image_size"):
        data.load(f"folder:{root}")


def test_pictures_are_grey_where_all_of_them_are(tmp_path):
    root = write_folder(tmp_path / "pictures", mode="L")
    assert data.load(f"folder:{root}").spec.image_shape == (8, 8, 1)
    PIL.Image.new("RGB", (8, 8), "red").save(root / "train" / "red" / "new.png")
    assert data.load(f"folder:{root}").spec.image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda root: shutil.rmtree(root / "train"), "train is no folder with a folder of pictures for each class"),
        (lambda root: (root / "test" / "violet").mkdir(), "has classes that are not trained on: violet"),
        (lambda root: [p.unlink() for p in (root / "test").glob("*/*")], "test holds no pictures"),
        (lambda root: (root / "train" / "red" / "x.png").write_text("no"), "x.png is no picture that can be read"),
        (
            lambda root: PIL.Image.new("I;16", (8, 8)).save(root / "train" / "red" / "deep.png"),
            "deep.png is no picture that can be read: it has more than 8 bits",
        ),
    ],
    ids=["no split", "unknown class", "empty", "no picture", "16 bits"],
)
def test_what_is_wrong_with_a_folder_is_named(break_it, message, tmp_path):
    root = write_folder(tmp_path / "pictures")
    break_it(root)
    with pytest.raises(UserError, match=message):
        data.load(f"folder:{root}")


def test_files_that_are_no_pictures_are_left_out_and_said(tmp_path, caplog):
    root = write_folder(tmp_path / "pictures")
    (root / "train" / "red" / "notes.txt").write_text("hello")
    (root / "train" / "red" / ".hidden").write_text("")
    assert data.load(f"folder:{root}").spec.train_size == 30
    assert "holds 1 files that are no pictures" in caplog.text


def test_arrays_in_a_file_may_be_grey_and_have_a_column_of_labels(tmp_path):
    images, labels = colours(30, 0)
    path = write_arrays(tmp_path / "a.npz", train_images=images[..., 0], train_labels=labels[:, None])
    with pytest.raises(UserError, match=r"images of \(8, 8, 1\) in train and \(8, 8, 3\) in test"):
        data.load(f"npz:{path}")
    path = write_arrays(
        path, train_images=images[..., 0], train_labels=labels[:, None], test_images=images[:12, ..., 1]
    )
    grey = data.load(f"npz:{path}")
    assert grey.spec.image_shape == (8, 8, 1) and grey.spec.names == ("0", "1", "2")
    np.testing.assert_array_equal(grey.train_labels, labels)


def test_splits_of_a_file_are_chosen_by_name(tmp_path):
    images, labels = colours(6, 5)
    path = write_arrays(tmp_path / "a.npz", val_images=images, val_labels=labels)
    np.testing.assert_array_equal(data.load(f"npz:{path}", splits=("train", "val")).test_images, images)
    with pytest.raises(UserError, match="has no dev_images, dev_labels; it has train_images"):
        data.load(f"npz:{path}", splits=("train", "dev"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_images": np.zeros((30, 8, 8, 3))}, r"images are float64 \(30, 8, 8, 3\); they must be uint8"),
        ({"train_labels": np.zeros(29, int)}, r"labels are int64 \(29,\); they must be .* each of the 30"),
        ({"test_labels": np.full(12, 0.5)}, "labels are float64"),
        ({"test_labels": np.full(12, -1)}, "a label is -1"),
    ],
)
def test_what_is_wrong_with_arrays_is_named(changes, message, tmp_path):
    path = write_arrays(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError, match=message):
        data.load(f"npz:{path}")


@pytest.mark.parametrize("content", [None, b"hello", b"PK\x03\x04"])
def test_a_file_that_is_no_npz_is_named(content, tmp_path):
    path = tmp_path / "a.npz"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz is no \.npz file that can be read"):
        data.load(f"npz:{path}")


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_model_of_another_size_is_told_what_to_set(kind, tmp_path):
    place = write_folder(tmp_path / "p") if kind == "folder" else write_arrays(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"has 3 classes; set --config.model.classes=3"):
        train.train(own_config(f"{kind}:{place}", **{"model.classes": 10}), tmp_path / "run")
    with pytest.raises(UserError, match=r'set --config.model.image_shape="\(8, 8, 3\)"'):
        train.train(own_config(f"{kind}:{place}", **{"model.image_shape": (4, 4, 3)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_data_of_ones_own_trains_predicts_and_may_move(kind, tmp_path):
    place = write_folder(tmp_path / "here") if kind == "folder" else write_arrays(tmp_path / "here.npz")
    workdir = tmp_path / "run"
    train.train(own_config(f"{kind}:{place}"), workdir)
    assert train.evaluate(own_config(f"{kind}:{place}"), workdir)["accuracy"] > 0.9
    moved = place.rename(place.with_name("moved" + place.suffix))
    assert train.evaluate(own_config(f"{kind}:{moved}"), workdir)["accuracy"] > 0.9
    run = load_run(workdir)  # which needs no data
    assert run.spec.names == (NAMES if kind == "folder" else ("0", "1", "2"))
    assert run.spec == data.load(f"{kind}:{moved}").spec and run.mean == run.spec.mean
    images, labels = colours(12, 7)
    assert (predict.predict(run, images).argmax(1) == labels).mean() > 0.9
    train.train(own_config(f"{kind}:{moved}"), workdir)  # finished: the config follows
    assert json.loads((workdir / "config.json").read_text())["data"]["name"] == f"{kind}:{moved}"


@pytest.mark.slow
def test_other_data_under_the_same_name_is_not_resumed_or_evaluated(tmp_path):
    path = write_arrays(tmp_path / "a.npz")
    train.train(own_config(f"npz:{path}"), tmp_path / "run")
    write_arrays(path, train_images=colours(33, 5)[0], train_labels=colours(33, 5)[1])
    with pytest.raises(UserError, match="train_size: 30 then, 33 now"):
        train.train(own_config(f"npz:{path}"), tmp_path / "run")
    with pytest.raises(UserError, match="the data is not what the run in .* is of.*\n  mean:"):
        train.evaluate(own_config(f"npz:{path}"), tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_holds_out_images_looks_at_the_test_set_only_when_it_is_asked_to(tmp_path):
    wrong = (colours(12, 1)[1] + 1) % 3  # a model that is right about the colours is wrong about all of these
    path = write_arrays(tmp_path / "a.npz", test_labels=wrong)
    config = own_config(f"npz:{path}", **{"data.validation_fraction": 0.2, "batch_size": 8})
    train.train(config, tmp_path / "run")
    tags = {tag for _, tag, _ in metrics.read(epath.Path(tmp_path / "run" / "metrics"))}
    assert "validation/accuracy" in tags and not any(tag.startswith("test/") for tag in tags)
    assert program.scalars(tmp_path / "run", "validation/accuracy")[-1][1] > 0.9
    assert train.evaluate(config, tmp_path / "run")["accuracy"] < 0.1
    assert load_run(tmp_path / "run", step="best").spec.train_size == 24
