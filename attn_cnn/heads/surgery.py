"""Parameters with heads pruned or reset, and which parameters are frozen for those that survive (paper, section 4.2).

Pruning removes a head's slice of every parameter that has one: what encodes its position and content, and its value
map W_h. Resetting replaces these slices by fresh ones. Which axis of a parameter holds the heads is seen from the
shapes that the model has with one and with two heads, whatever the encoding.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from jaxtyping import Bool

from attn_cnn import encodings, schema
from attn_cnn.attention import layer_number
from attn_cnn.encodings import Encoding, encoding_class
from attn_cnn.errors import UserError
from attn_cnn.model import abstract_variables, has_heads, kinds_and_heads

FIELDS = {
    "degenerate_heads": schema.choice("keep", "prune", "reset", default="keep"),
    "freeze": schema.choice("none", "positions", "values", "both", default="none"),
}

Path = tuple[str, ...]  # of a parameter, as in ("layer_0", "attention", "centers")
Layers = tuple[tuple[int, ...], ...]  # some heads of each layer


class Surgery(NamedTuple):
    """What became of the heads that a config asks for, before the first step; heads have the config's numbers.

    Attributes:
      kept: of each layer, the heads that the model has.
      reset: of each layer, those of them that were drawn anew.
    """

    kept: Layers
    reset: Layers

    def pruned(self, chosen: Mapping[int, Any]) -> "Surgery":
        """Returns the surgery that also removes the `chosen` heads of layers, numbered as they stand now."""
        kept = [[h for at, h in enumerate(heads) if at not in chosen.get(n, ())] for n, heads in enumerate(self.kept)]
        reset = [[h for h in heads if h in kept[n]] for n, heads in enumerate(self.reset)]
        return Surgery(_tuples(kept), _tuples(reset))

    def with_reset(self, chosen: Mapping[int, Any]) -> "Surgery":
        """Returns the surgery that draws just the `chosen` heads of layers anew, numbered as they stand now."""
        reset = [[h for at, h in enumerate(heads) if at in chosen.get(n, ())] for n, heads in enumerate(self.kept)]
        return Surgery(self.kept, _tuples(reset))


def _tuples(layers: list[list[int]]) -> Layers:
    return tuple(map(tuple, layers))


def untouched(model: ml_collections.ConfigDict) -> Surgery:
    """Returns the surgery of a config's `model` that leaves all its heads as they are."""
    heads = schema.for_each_layer(model.heads, model.layers)
    return Surgery(tuple(tuple(range(n)) for n in heads), ((),) * model.layers)


def numbers_of_heads(model: ml_collections.ConfigDict) -> dict[int, int]:
    """Returns the number of heads of each attention layer that has some, by the layer's number."""
    return {n: heads for n, (kind, heads) in enumerate(kinds_and_heads(model)) if kind == "attention" and heads}


def with_remaining_heads(model: ml_collections.ConfigDict, surgery: Surgery | None) -> ml_collections.ConfigDict:
    """Returns a config's `model` with the heads that remain."""
    if surgery is None or surgery.kept == untouched(model).kept:
        return model
    return _with_heads(model, tuple(map(len, surgery.kept)))


def _with_heads(model: ml_collections.ConfigDict, heads: int | tuple[int, ...]) -> ml_collections.ConfigDict:
    """Returns `model` with other numbers of heads, which need not fill the window that they may have started on."""
    start = {name: encodings.FIELDS[name].default for name in ("init", "init_spread")}
    return ml_collections.ConfigDict(model.to_dict() | start | {"heads": heads})


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if a config asks to prune, reset or freeze what its model or its start do not have."""
    model, treatment, freeze = config.model, config.degenerate_heads, config.freeze
    encoding = encoding_class(model.encoding) if has_heads(model) else None
    if treatment != "keep":
        if not config.init_from:
            raise UserError(
                f"config.degenerate_heads is {treatment}, but the run starts from no other; set config.init_from."
            )
        if encoding is None or encoding.degenerate is Encoding.degenerate:
            raise UserError(
                f"config.degenerate_heads is {treatment}, but no head of this model can be degenerate; set it to keep."
            )
    if freeze == "none":
        return
    if encoding is None:
        raise UserError(f"config.freeze is {freeze}, but this model has no heads; set it to none.")
    if freeze == "values":
        return
    if not encoding.positions:
        raise UserError(
            f"config.freeze is {freeze}, but the {encoding.name} encoding names no positions; set it to values or none."
        )
    if config.condition_penalty and treatment != "reset":
        raise UserError(
            f"config.condition_penalty is {config.condition_penalty}, but config.freeze is {freeze}, which leaves no "
            "position to penalise; set one of them to none."
        )


def head_axes(model: ml_collections.ConfigDict) -> dict[Path, int | None]:
    """Returns of every parameter that a config's `model` has with some heads the axis that holds them, or None."""

    def shapes(heads):
        params = abstract_variables(_with_heads(model, heads))["params"]
        return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}

    def axis(one, two):
        return next((axis for axis, sizes in enumerate(zip(one, two, strict=True)) if sizes == (1, 2)), None)

    one, two = shapes(1), shapes(2)
    return {path: axis(one[path], two[path]) for path in one}


def prune(tree: Any, model: ml_collections.ConfigDict, chosen: Mapping[int, Any]) -> Any:
    """Returns `tree` without the `chosen` heads of layers, wherever it holds the parameters of a config's `model`.

    It may be the parameters themselves, an optimizer's state, or a whole training state. A layer without heads keeps
    its value's bias alone.
    """
    axes, paths = head_axes(model), traverse_util.flatten_dict(abstract_variables(model)["params"]).keys()
    kept = untouched(model).pruned(chosen).kept
    wanted = traverse_util.flatten_dict(abstract_variables(_with_heads(model, tuple(map(len, kept))))["params"])

    def of_parameter(path, leaf):
        axis = axes.get(path)
        # Muon's parts share the parameters out: in each, a node without leaves stands for one of the other's.
        if axis is None or not jax.tree.leaves(leaf):
            return leaf
        return jnp.take(leaf, jnp.array(kept[layer_number(path[0])]), axis)

    def are_params(part):
        return isinstance(part, dict) and traverse_util.flatten_dict(part).keys() == paths

    def of_part(part):
        if not are_params(part):
            return part
        flat = traverse_util.flatten_dict(part)
        return traverse_util.unflatten_dict({path: of_parameter(path, flat[path]) for path in wanted})

    return jax.tree.map(of_part, tree, is_leaf=are_params)


def reset(params: dict, fresh: dict, model: ml_collections.ConfigDict, chosen: Mapping[int, Any]) -> dict:
    """Returns `params` with the slices of the `chosen` heads of layers taken from `fresh`, parameters of that model."""
    axes, flat, fresh = head_axes(model), traverse_util.flatten_dict(params), traverse_util.flatten_dict(fresh)

    def of_parameter(path, leaf):
        axis = axes.get(path)
        if axis is None:
            return leaf
        mask = _mask(leaf, axis, chosen.get(layer_number(path[0]), ()))
        return jnp.where(mask, fresh[path], leaf)

    return traverse_util.unflatten_dict({path: of_parameter(path, leaf) for path, leaf in flat.items()})


def _mask(leaf: Any, axis: int, heads: Collection[int]) -> Bool[np.ndarray, "*shape"]:
    """Returns True at the `heads`, in a shape that broadcasts against `leaf`."""
    shape = [size if at == axis else 1 for at, size in enumerate(leaf.shape)]
    return np.isin(np.arange(leaf.shape[axis]), list(heads)).reshape(shape)


def frozen(
    model: ml_collections.ConfigDict, freeze: str, surgery: Surgery | None, is_fresh: Callable[[Path], bool]
) -> dict:
    """Returns, for the parameters of a `model` after `surgery`, masks of what training must not change.

    Reset heads move, and so does what `is_fresh` names: neither has been trained before. A parameter that several heads
    share stays for the sake of those that survive.

    Args:
      model: the config's model, with the heads that remain.
      freeze: config.freeze.
      surgery: what became of the heads; None: nothing.
      is_fresh: whether a path begins afresh.
    """
    positions = encoding_class(model.encoding).positions if freeze in ("positions", "both") else ()
    values = ("attention", "value", "kernel") if freeze in ("values", "both") else None
    axes = head_axes(model) if surgery and any(surgery.reset) else {}

    def of_parameter(path, leaf):
        if is_fresh(path) or not (set(path) & set(positions) or path[-3:] == values):
            return np.array(False)
        axis = axes.get(path)
        if axis is None:
            return np.array(True)
        kept, moving = (heads[layer_number(path[0])] for heads in surgery)
        return ~_mask(leaf, axis, [kept.index(head) for head in moving])

    flat = traverse_util.flatten_dict(abstract_variables(model)["params"])
    return traverse_util.unflatten_dict({path: of_parameter(path, leaf) for path, leaf in flat.items()})
