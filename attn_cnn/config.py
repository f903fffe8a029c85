"""What a config may hold: every field, its type and its range, checked before anything is compiled.

`configs/` holds the values of the experiments; this module says which values mean something.
"""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_collections
from etils import epath

from attn_cnn import data, positions
from attn_cnn.errors import UserError


@dataclass(frozen=True)
class Field:
    """A field's test and the words an error uses for what it accepts."""

    accepts: Callable[[Any], bool]
    wanted: str


def _integer(low: int, high: int) -> Field:
    return Field(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low:,} to {high:,}")


def _number(low: float, high: float, below: bool = False) -> Field:
    def accepts(v):
        return type(v) in (int, float) and (low <= v < high if below else low <= v <= high)

    return Field(accepts, f"a number from {low:g} to {'below ' if below else ''}{high:g}")


def _choice(*choices: str) -> Field:
    return Field(lambda v: type(v) is str and v in choices, "one of " + ", ".join(choices))


def _increasing(v) -> bool:
    return all(type(e) is int and e > 0 for e in v) and sorted(set(v)) == list(v)


_BOOLEAN = Field(lambda v: type(v) is bool, "True or False")
_TEXT = Field(lambda v: type(v) is str, "text")
_EPOCHS = Field(lambda v: type(v) is tuple and _increasing(v), "increasing whole numbers, as in (80, 150)")
_SHAPE = Field(
    lambda v: type(v) is tuple and len(v) == 3 and all(type(n) is int and 0 < n <= 4096 for n in v),
    "(height, width, channels), each from 1 to 4,096",
)

RUN_FIELDS = {
    "seed": _integer(0, 2**31 - 1),
    "epochs": _integer(1, 100_000),
    "batch_size": _integer(1, 1_000_000),
    "eval_batch_size": _integer(1, 10_000),
    "log_every_steps": _integer(1, 1_000_000),
    "dtype": _choice("float32", "bfloat16"),
    "matmul_precision": _choice("default", "high", "highest"),
    "data.name": _choice("cifar10", "cifar100", "digits"),
    "data.dir": _TEXT,
    "data.crop_padding": _integer(0, 16),
    "data.flip": _BOOLEAN,
    "optimizer.name": _choice("sgd", "adam"),
    "optimizer.learning_rate": _number(0, 1000),
    "optimizer.momentum": _number(0, 1, below=True),
    "optimizer.weight_decay": _number(0, 1),
    "optimizer.warmup": _number(0, 1, below=True),
    "optimizer.schedule": _choice("cosine", "step"),
    "optimizer.decay_epochs": _EPOCHS,
    "checkpoint.every_epochs": _integer(1, 100_000),
    "checkpoint.keep": _integer(1, 1000),
}
IMAGE_FIELDS = {"image_shape": _SHAPE, "classes": _integer(2, 100_000)}
MODEL_FIELDS = {
    "attention": IMAGE_FIELDS
    | {
        "encoding": _choice(*positions.ENCODINGS),
        "mixing": _choice("auto", "factored", "dense"),
        "layers": _integer(1, 100),
        "heads": _integer(1, 1024),
        "hidden_size": _integer(1, 65_536),
        "mlp_size": _integer(1, 262_144),
        "patch": _integer(1, 4096),
        "max_side": _integer(1, 4096),
        "embedding_size": _integer(0, 65_536),
        "share_tables": _BOOLEAN,
        "dropout": _number(0, 1, below=True),
        "attention_dropout": _number(0, 1, below=True),
        "attention_dropout_on": _choice("probabilities", "factors"),
    },
    "resnet18": IMAGE_FIELDS | {"width": _integer(1, 4096)},
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming field, value and choices, unless the config describes a run."""
    values = _flatten(config)
    model = {k: v for k, v in values.items() if k.startswith("model.")}
    _check_fields({k: v for k, v in values.items() if k not in model}, RUN_FIELDS, "config.")
    if not model:
        raise UserError("config.model is missing.")
    check_model(config.model)
    _check_data(config)
    optimizer = config.optimizer
    if optimizer.schedule == "step" and optimizer.warmup:
        raise UserError(f"config.optimizer.warmup is {optimizer.warmup}, which the step schedule ignores; set it to 0.")
    if optimizer.schedule == "cosine" and optimizer.decay_epochs:
        raise UserError(
            f"config.optimizer.decay_epochs is {optimizer.decay_epochs}, which the cosine schedule ignores; "
            "set it to () or config.optimizer.schedule to step."
        )


def _check_data(config) -> None:
    name, spec = config.data.name, data.SPECS[config.data.name]
    if tuple(config.model.image_shape) != spec.image_shape:
        raise UserError(
            f"config.model.image_shape is {config.model.image_shape}, but {name}'s images are {spec.image_shape}."
        )
    if config.model.classes != spec.classes:
        raise UserError(f"config.model.classes is {config.model.classes}, but {name} has {spec.classes} classes.")
    if config.batch_size > spec.train_size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {spec.train_size:,} images {name} trains on."
        )


def check_model(model: ml_collections.ConfigDict) -> None:
    """The same for `config.model` alone."""
    values = _flatten(model)
    name = values.pop("name", None)
    _check_fields({"name": name}, {"name": _choice(*MODEL_FIELDS)}, "config.model.")
    _check_fields(values, MODEL_FIELDS[name], "config.model.")
    if name == "attention":
        _check_attention(model)


def check_name(name: str) -> None:
    """Raises UserError unless `name`, as in "model.heads", is a field of some config or holds fields."""
    model = {f"model.{field}" for fields in MODEL_FIELDS.values() for field in fields}
    known = set(RUN_FIELDS) | model | {"model.name"}
    if not any(field == name or field.startswith(f"{name}.") for field in known):
        raise UserError(f"unknown field config.{name}; the fields are {', '.join(sorted(known))}.")


def _check_attention(model) -> None:
    height, width, _ = model.image_shape
    divisors = [d for d in range(1, min(height, width) + 1) if height % d == 0 and width % d == 0]
    if model.patch not in divisors:
        raise UserError(
            f"config.model.patch is {model.patch}, which does not divide the {height}x{width} image; "
            f"choose one of {', '.join(map(str, divisors))}."
        )
    learned = model.encoding in positions.LEARNED
    side = max(height, width) // model.patch
    if learned and side > model.max_side:
        raise UserError(
            f"config.model.max_side is {model.max_side}, but patches of {model.patch} make a grid of side {side}; "
            f"set max_side to {side} or more."
        )
    if not learned and (model.share_tables or model.embedding_size):
        raise UserError(
            f"the {model.encoding} encoding has no tables: set config.model.share_tables to False and "
            "config.model.embedding_size to 0."
        )
    if model.encoding in positions.HALVING:
        if model.hidden_size % 2:
            raise UserError(
                f"config.model.hidden_size is {model.hidden_size}; the {model.encoding} encoding halves each "
                "query, so it must be even."
            )
        if model.embedding_size not in (0, model.hidden_size // 2):
            raise UserError(
                f"config.model.embedding_size is {model.embedding_size}; the {model.encoding} encoding multiplies "
                f"tables with half a query, so it must be {model.hidden_size // 2}, or 0 for just that."
            )
    if model.mixing == "factored":
        if model.encoding not in positions.SEPARABLE:
            raise UserError(
                f"config.model.mixing is factored, but the {model.encoding} score is no sum of a row and a column "
                "term, so its softmax has no factors; set mixing to auto or dense."
            )
        if model.attention_dropout and model.attention_dropout_on == "probabilities":
            raise UserError(
                "config.model.mixing is factored, but dropout on the probabilities "
                f"(config.model.attention_dropout is {model.attention_dropout}) breaks the product of factors; "
                "set attention_dropout to 0, attention_dropout_on to factors, or mixing to auto."
            )
    if model.attention_dropout_on == "factors" and model.encoding not in positions.SEPARABLE:
        raise UserError(
            f"config.model.attention_dropout_on is factors, but the {model.encoding} encoding has none; "
            "set it to probabilities."
        )


def _check_fields(values: dict, fields: dict[str, Field], prefix: str) -> None:
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"unknown field {prefix}{unknown[0]}; the fields are {', '.join(sorted(fields))}.")
    if missing := sorted(set(fields) - set(values)):
        raise UserError(f"{prefix}{missing[0]} is missing; it must be {fields[missing[0]].wanted}.")
    for name, value in values.items():
        if not fields[name].accepts(value):
            raise UserError(f"{prefix}{name} is {value!r}; it must be {fields[name].wanted}.")


def _flatten(config, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def save(config: ml_collections.ConfigDict, path: epath.Path) -> None:
    """Writes the config as JSON, whole or not at all, unless another process was first."""
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    if not os.path.isdir(path.parent):  # an object store, which writes files whole
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: epath.Path) -> ml_collections.ConfigDict:
    """Reads a config that `save` wrote, and checks it.

    Raises:
      UserError: the file is no JSON or no config.
    """

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    try:
        config = ml_collections.ConfigDict(tuples(json.loads(path.read_text())))
        if config.model.name == "attention" and "attention_dropout_on" not in config.model:
            config.model.attention_dropout_on = "probabilities"  # of a run from before there was the choice
        check(config)
    except (OSError, RecursionError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a config: {error}") from None
    except UserError as error:
        raise UserError(f"{path} was changed: {error}") from None
    return config


def differences(
    ours: ml_collections.ConfigDict, theirs: ml_collections.ConfigDict, only: tuple[str, ...] = ("",)
) -> list[str]:
    """The fields (beginning with one of `only`) in which two configs differ, as lines to read.

    Where the data lies is no difference.
    """
    a, b = _flatten(ours), _flatten(theirs)
    names = sorted(n for n in (set(a) | set(b)) - {"data.dir"} if n.startswith(only))
    return [f"{n}: {b.get(n)!r} then, {a.get(n)!r} now" for n in names if a.get(n) != b.get(n)]


def default_workdir(config_argument: str) -> str:
    """runs/<config name>[_<scale>] for what --config was given, as in configs/quadratic.py:digits."""
    path, _, scale = config_argument.partition(":")
    return "runs/" + "_".join(filter(None, (epath.Path(path).stem, scale)))
