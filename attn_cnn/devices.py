"""Several devices and several hosts: the one place where a step for one device becomes a step for all.

A step is written for one device with the named axis `AXIS`. Its state, the data and the indices of the global
batch are the same on every device; `positions` alone differ: they are the device's share of the global batch,
so nothing depends on how devices are numbered across hosts.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from attn_cnn.errors import UserError

AXIS = "devices"


def mapped(step: Callable, sharded_argument: int, arguments: int, donate: tuple = ()) -> Callable:
    """`step` on all devices at once: one argument is sharded on its leading axis, all else is replicated."""
    in_axes = [None] * arguments
    in_axes[sharded_argument] = 0
    # To leave pmap: jax.jit(jax.shard_map(step, mesh=..., in_specs=..., out_specs=P()), donate_argnums=donate)
    return jax.pmap(
        step, axis_name=AXIS, in_axes=tuple(in_axes), out_axes=None, donate_argnums=donate
    )


def _local_sharding(*spec: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(*spec))


def replicate(tree: Any) -> Any:
    """The same arrays on each of this process's devices."""
    return jax.device_put(tree, _local_sharding())


def positions(batch_size: int) -> Int[Array, "local_devices share"]:
    """Each local device's places in the global batch.

    Raises:
      UserError: the devices cannot share the batch evenly.
    """
    check_batch_size(batch_size, jax.device_count())
    shares = np.arange(batch_size, dtype=np.int32).reshape(jax.device_count(), -1)
    first = jax.process_index() * jax.local_device_count()
    return jax.device_put(shares[first : first + jax.local_device_count()], _local_sharding(AXIS))


def check_batch_size(batch_size: int, devices: int) -> None:
    """Raises UserError, with the nearest sizes that fit, unless `devices` divides `batch_size`."""
    if batch_size % devices:
        below = batch_size // devices * devices
        sizes = " or ".join(str(s) for s in (below, below + devices) if s)
        raise UserError(
            f"config.batch_size is {batch_size}, which {devices} devices cannot share evenly; "
            f"the nearest that they can: {sizes}."
        )
