"""What a config may hold: the kinds of fields, what each accepts, and the check of a config against them.

The fields themselves stand beside the code that reads them: a run's in `training/experiment.py`, the data set's in
`training/data.py`, the optimizer's in `training/optim.py`, checkpoints' in `training/checkpoint.py`, surgery's in
`heads/surgery.py`, the models' in `model.py`, `resnet.py` and `encodings.py`. A field that came later than the first
runs has a default that means what was done before, so that their workdirs load.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections
import numpy as np

from attn_cnn.errors import UserError

REQUIRED = object()  # stands where a field has no default


@dataclass(frozen=True)
class Field:
    """What one field of a config accepts.

    Attributes:
      accepts: whether a value is one that the field can have.
      wanted: what the field accepts, in words that follow "it must be".
      default: what the field is where a config does not have it, or `REQUIRED`.
    """

    accepts: Callable[[Any], bool]
    wanted: str
    default: Any = REQUIRED


def plain(value: Any) -> Any:
    """Returns a value, or a tree of values, with Python's own numbers for NumPy's scalars, which sweeps make."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def integer(low: int, high: int, default: Any = REQUIRED) -> Field:
    """Describes a whole number from `low` to `high`, both included."""
    return Field(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low:,} to {high:,}", default)


def number(low: float, high: float, below: bool = False, default: Any = REQUIRED) -> Field:
    """Describes a number from `low` to `high`; `below` leaves `high` itself out."""

    def accepts(v):
        return type(v) in (int, float) and (low <= v < high if below else low <= v <= high)

    return Field(accepts, f"a number from {low:g} to {'below ' if below else ''}{high:g}", default)


def choice(*choices: str, default: Any = REQUIRED) -> Field:
    """Describes one of some words."""
    return Field(lambda v: type(v) is str and v in choices, "one of " + ", ".join(choices), default)


def boolean(default: Any = REQUIRED) -> Field:
    """Describes True or False."""
    return Field(lambda v: type(v) is bool, "True or False", default)


def text(default: Any = REQUIRED) -> Field:
    """Describes any text."""
    return Field(lambda v: type(v) is str, "text", default)


def tuple_of(accepts: Callable[[tuple], bool], wanted: str, default: Any = REQUIRED) -> Field:
    """Describes a tuple that `accepts` takes."""
    return Field(lambda v: type(v) is tuple and accepts(v), wanted, default)


def each_layer(field: Field) -> Field:
    """Describes a value that `field` accepts, for all layers, or a tuple with one for each layer."""

    def accepts(v):
        return all(map(field.accepts, v)) if type(v) is tuple and v else field.accepts(v)

    return Field(accepts, f"{field.wanted}, or a tuple with one for each layer", field.default)


def one_or_each(value: Any) -> ml_collections.FieldReference:
    """Returns `value` as a field of a config that the command line may also make a tuple, as in heads=(9,9,4)."""
    return ml_collections.FieldReference(value, field_type=object)


def for_each_layer(value: Any, layers: int) -> tuple:
    """Returns one value for each layer, given one for all or just that."""
    return value if type(value) is tuple else (value,) * layers


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the fields by their names with dots, as in {"model.heads": 9}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def completed(config: ml_collections.ConfigDict, fields: Mapping[str, Field]) -> ml_collections.ConfigDict:
    """Returns a copy of `config` in which the fields that it lacks have their defaults.

    A group of fields that is missing whole is there, too, where all of them have one.
    """
    config = ml_collections.ConfigDict(plain(config.to_dict()))
    defaults = {name: field.default for name, field in fields.items() if field.default is not REQUIRED}
    for name, default in defaults.items():
        *parents, leaf = name.split(".")
        holder = config
        for depth, parent in enumerate(parents, 1):
            group = ".".join(parents[:depth]) + "."
            optional = all(name in defaults for name in fields if name.startswith(group))
            if optional and isinstance(holder, ml_collections.ConfigDict) and parent not in holder:
                holder[parent] = ml_collections.ConfigDict()
            holder = holder.get(parent) if isinstance(holder, ml_collections.ConfigDict) else None
        if isinstance(holder, ml_collections.ConfigDict) and leaf not in holder:
            holder[leaf] = default
    return config


def check(values: Mapping[str, Any], fields: Mapping[str, Field], prefix: str) -> None:
    """Raises UserError unless `values` has just the `fields`, each with a value that it accepts.

    The message names the field, with `prefix` in front, its value, and what it accepts.
    """
    for name in sorted(set(values) - set(fields)):
        raise UserError(f"unknown field {prefix}{name}; {suggestion(name, fields, prefix)}")
    for name in sorted(set(fields) - set(values)):
        raise UserError(f"{prefix}{name} is missing; it must be {fields[name].wanted}.")
    for name, value in values.items():
        if not fields[name].accepts(value):
            raise UserError(f"{prefix}{name} is {value!r}; it must be {fields[name].wanted}.")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the one of `known` that was probably meant by `name`, as "learning_rate" by "lr", or None."""
    parents, _, leaf = name.rpartition(".")
    split = {other: other.rpartition(".")[::2] for other in sorted(known)}
    siblings = {other_leaf: other for other, (where, other_leaf) in split.items() if where == parents}
    for other_leaf, other in siblings.items():
        if leaf in ("".join(word[:1] for word in other_leaf.split("_")), other_leaf.replace("_", "")):
            return other
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return siblings[close[0]]
    same_leaf = [other for other, (_, other_leaf) in split.items() if other_leaf == leaf]
    return same_leaf[0] if len(same_leaf) == 1 else None


def suggestion(name: str, known: Iterable[str], prefix: str) -> str:
    """Returns the end of a message about an unknown field: the one that was probably meant, or those that there are."""
    known = sorted(known)
    meant = nearest(name, known)
    return f"did you mean {prefix}{meant}?" if meant else f"the fields are {', '.join(known)}."
