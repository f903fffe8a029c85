"""The data that a config names: its fields, the part of it that a run trains on, and the order of the examples.

The arrays come from `sources.py` and `tfds_sets.py`. The order of examples is a function of (seed, epoch) alone, so
that any run can be resumed at any step, on any number of devices.
"""

import dataclasses
import functools
import os

import ml_collections
import numpy as np
from jaxtyping import Int

from attn_cnn import paths, schema
from attn_cnn.errors import UserError
from attn_cnn.training import sources, tfds_sets
from attn_cnn.training.dataset import Dataset, Spec

CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

# Data sets that are known before they are loaded, with the mean and deviation that are usual for CIFAR.
SPECS = {
    "cifar10": Spec(
        (32, 32, 3),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        50_000,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Spec(
        (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 50_000, tuple(CIFAR100_NAMES.split())
    ),
    "digits": Spec((8, 8, 1), (0.3054,), (0.3760,), 1_437, tuple("0123456789")),
}

SPLITS = ("train", "test")

FIELDS = {
    "name": schema.Field(
        lambda v: type(v) is str and v.strip() != "",
        "digits, the name of a data set of TensorFlow Datasets as cifar10, folder:PATH or npz:PATH",
    ),
    "dir": schema.text(),
    "train_split": schema.text(default="train"),
    "test_split": schema.text(default="test"),
    "image_size": schema.integer(0, 4096, default=0),
    "train_fraction": schema.number(0, 1, default=1.0),
    "validation_fraction": schema.number(0, 1, below=True, default=0.0),
    "crop_padding": schema.integer(0, 16),
    "flip": schema.boolean(),
}


def check(config: ml_collections.ConfigDict, spec: Spec | None = None) -> None:
    """Raises UserError unless the model of `config` takes the images and classes of its data set, or of `spec`.

    What is not known before the data is loaded is not checked without a `spec`.
    """
    data = config.data
    if data.image_size and not data.name.startswith("folder:"):
        raise UserError(
            f"config.data.image_size is {data.image_size}, but only pictures of a folder are resized; set it to 0."
        )
    if data.name == "digits" and (data.train_split, data.test_split) != SPLITS:
        raise UserError(
            "config.data.train_split and test_split of digits are 'train' and 'test', not "
            f"{data.train_split!r} and {data.test_split!r}."
        )
    if spec := spec or known_spec(data):
        _check_spec(config, spec)


def _check_spec(config: ml_collections.ConfigDict, spec: Spec) -> None:
    name = config.data.name
    if tuple(config.model.image_shape) != spec.image_shape:
        raise UserError(
            f"config.model.image_shape is {config.model.image_shape}, but {name}'s images are {spec.image_shape}; set "
            f'--config.model.image_shape="{spec.image_shape}".'
        )
    if config.model.classes != spec.classes:
        raise UserError(
            f"config.model.classes is {config.model.classes}, but {name} has {spec.classes} classes; set "
            f"--config.model.classes={spec.classes}."
        )
    if config.batch_size > spec.train_size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {spec.train_size:,} images {name} trains on."
        )


def known_spec(data: ml_collections.ConfigDict) -> Spec | None:
    """Returns what is known of the data of a config before it is loaded; None: nothing."""
    whole = data.train_fraction == 1 and not data.validation_fraction
    return SPECS.get(data.name) if whole and (data.train_split, data.test_split) == SPLITS else None


def load(name: str, data_dir: str = "", splits: tuple[str, str] = SPLITS, image_size: int = 0) -> Dataset:
    """Returns the whole data set.

    Args:
      name: as config.data.name.
      data_dir: tfds's directory; empty: `TFDS_DATA_DIR`, or tfds's default.
      splits: the split to train on and the one to test on.
      image_size: the side to which pictures of a folder are resized; 0: they are of one size.

    Raises:
      UserError: the data is neither on disk nor reachable, or cannot be read.
    """
    kind, colon, place = name.partition(":")
    if name == "digits":
        dataset = Dataset(*sources.digits(), SPECS["digits"])
    elif colon and kind == "npz":
        dataset = sources.arrays(paths.resolve(place, "config.data.name"), splits)
    elif colon and kind == "folder":
        dataset = sources.folder(paths.resolve(place, "config.data.name"), splits, image_size)
    else:
        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        root = paths.resolve(root, "the data's folder (config.data.dir, or TFDS_DATA_DIR)")
        dataset = tfds_sets.load(name, root, splits)
    if name in SPECS:  # the usual mean and deviation, whatever the copy
        known = SPECS[name]
        dataset = dataset._replace(spec=dataclasses.replace(dataset.spec, mean=known.mean, std=known.std))
    return dataset


def load_part(data: ml_collections.ConfigDict) -> Dataset:
    """Returns the data that a config's `data` asks for: the part to train on, and the test set or what is held out.

    Raises:
      UserError: the data is neither on disk nor reachable, cannot be read, or the part lacks a class.
    """
    whole = load(data.name, data.dir, (data.train_split, data.test_split), data.image_size)
    return part(whole, data.train_fraction, data.validation_fraction)


def load_with_test_set(data: ml_collections.ConfigDict) -> Dataset:
    """Returns the data that a config's `data` names with its test set, also where a part is held out to choose by.

    Raises:
      UserError: as `load_part`.
    """
    data = data.copy_and_resolve_references()
    data.validation_fraction = 0.0
    return load_part(data)


def part(dataset: Dataset, train_fraction: float, validation_fraction: float) -> Dataset:
    """Returns a stratified part of a data set: the same images whatever the seed and the number of devices.

    Args:
      dataset: the whole.
      train_fraction: share of each class to train on, of what is not held out. A larger share holds the smaller.
      validation_fraction: share of each class of the training set that is held out and takes the test set's place; 0:
        none is.

    Raises:
      UserError: no image of some class would be left.
    """
    images, labels, rest = dataset.train_images, dataset.train_labels, np.arange(len(dataset.train_labels))
    if validation_fraction:
        held = stratified(labels, validation_fraction)
        rest = np.setdiff1d(rest, held)
        for left in (held, rest):
            _check_classes(labels[left], labels, f"config.data.validation_fraction is {validation_fraction}")
        dataset = dataset._replace(test_images=images[held], test_labels=labels[held])
    if len(rest) < len(labels) or train_fraction < 1:
        rest = rest[stratified(labels[rest], train_fraction)]
        _check_classes(labels[rest], labels, f"config.data.train_fraction is {train_fraction}")
        dataset = dataset._replace(train_images=images[rest], train_labels=labels[rest])
    return dataset._replace(spec=dataclasses.replace(dataset.spec, train_size=len(dataset.train_labels)))


def stratified(labels: Int[np.ndarray, "images"], fraction: float) -> Int[np.ndarray, "part"]:
    """Returns, in order, the places of a `fraction` of each class, which is always the same."""
    order = np.random.default_rng(0).permutation(len(labels))
    classes = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([of_class[: round(fraction * len(of_class))] for of_class in classes]))


def _check_classes(left: np.ndarray, labels: np.ndarray, cause: str) -> None:
    classes, remaining = len(np.unique(labels)), len(np.unique(left))
    if remaining < classes:
        raise UserError(f"{cause}, which leaves {classes - remaining} of {classes} classes no image.")


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, examples: int) -> Int[np.ndarray, "{examples}"]:
    """Returns the permutation in which an epoch visits the training set; it is not to be written to."""
    order = np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)
    order.flags.writeable = False
    return order
