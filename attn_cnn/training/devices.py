"""Several devices and several hosts: the one place where a step for one device becomes a step for all.

A step is written for one device, with the named axis `AXIS` over devices, and takes three arguments: a state, what is
the same on every device, and the device's share. The share says which places of the global batch are the device's, so
that nothing depends on how devices are numbered across hosts.
"""

import functools
import logging
import math
import os
import zlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from attn_cnn.errors import UserError

Result = TypeVar("Result")

log = logging.getLogger("attn_cnn")

AXIS = "devices"
PMAP = True  # False: jit and shard_map, which give the same bits and will do when JAX has no pmap


@runtime_checkable
class Step(Protocol):
    """A step on all devices at once, which can also be compiled before it is called."""

    def __call__(self, state: Any, same: Any, shares: Any) -> Any:
        """Takes the state, what is the same on every device, and the devices' shares."""
        ...

    def lower(self, state: Any, same: Any, shares: Any) -> jax.stages.Lowered:
        """Returns the step for such arguments, which may be abstract, ready to be compiled."""
        ...


def mapped(step: Callable[[Any, Any, Any], Any], donate: bool = False) -> Step:
    """Returns `step` on all devices at once; `donate` lets it overwrite the state that it is given.

    The state and what is the same are there once on each device; the shares have a leading axis of local devices.
    """
    donated = (0,) if donate else ()
    if PMAP:
        return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=donated)
    return sharded(step, Mesh(np.array(jax.devices()), (AXIS,)), donated)


def sharded(step: Callable[[Any, Any, Any], Any], mesh: Mesh, donated: tuple[int, ...] = ()) -> Step:
    """Returns `step` on the devices of `mesh`, which may be of a machine that is not here, by jit and shard_map."""
    everywhere, shared = PartitionSpec(), PartitionSpec(AXIS)
    of_devices = jax.shard_map(
        lambda state, same, shares: step(state, same, shares[0]),
        mesh=mesh,
        in_specs=(everywhere, everywhere, shared),
        out_specs=everywhere,
        check_vma=False,  # what a step returns is the same on all devices, which it cannot see
    )
    return jax.jit(of_devices, donate_argnums=donated)


def _sharding(*spec: str) -> NamedSharding:
    """Returns a sharding over the devices whose arrays steps take: all of them, or for pmap those of this process."""
    return NamedSharding(Mesh(np.array(jax.local_devices() if PMAP else jax.devices()), (AXIS,)), PartitionSpec(*spec))


def replicate(tree: Any) -> Any:
    """Puts the same arrays on each device."""
    return jax.device_put(tree, _sharding())


def distribute(values: Shaped[np.ndarray, "devices *shape"]) -> Shaped[Array, "devices *shape"]:
    """Puts one of `values` on each of this process's devices."""
    return jax.make_array_from_process_local_data(_sharding(AXIS), values)


def shares(batch_size: int, pieces: int = 1) -> Int[Array, "devices pieces share"]:
    """Returns the places in a batch of `batch_size` images that are each of this process's devices', in equal pieces.

    There are at most as many pieces as asked for. Where the devices cannot share the batch evenly, the last places of
    some are -1: no image.
    """
    share = math.ceil(batch_size / (jax.device_count() * pieces))
    pieces = math.ceil(batch_size / (jax.device_count() * share))
    places = np.full(jax.device_count() * pieces * share, -1, np.int32)
    places[:batch_size] = np.arange(batch_size)
    of_devices = places.reshape(jax.process_count(), jax.local_device_count(), pieces, share)
    return distribute(of_devices[jax.process_index()])


def on_every_host(work: Callable[[], Result]) -> Result:
    """Does `work` on each host; where it fails on some it fails on all, and none waits for the others in vain.

    Raises:
      Exception: whatever this host's `work` raised.
      UserError: other hosts failed; it names them.
    """
    failure = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failed = everywhere(failure is not None)
    if failure is not None:
        raise failure
    if failed.any():
        raise UserError(f"process {', '.join(map(str, np.flatnonzero(failed)))} cannot go on; its log says why.")
    return result


def everywhere(value: bool | int) -> Int[np.ndarray, "processes"]:
    """Returns each process's value, known to all."""
    if jax.process_count() == 1:
        return np.array([int(value)])
    return np.asarray(multihost_utils.process_allgather(np.int32(value))).reshape(-1)


def agree(*parts: bytes | np.ndarray) -> bool:
    """Returns whether all processes were given the same bytes; a process alone need not read them."""
    if jax.process_count() == 1:
        return True
    crc = functools.reduce(lambda crc, part: zlib.crc32(bytes(part), crc), parts, 0)
    return len(set(everywhere(crc & 0x7FFFFFFF).tolist())) == 1


def check_memory(needed: int) -> None:
    """Raises UserError if `needed` bytes on each device are more than a device of this host has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    limit = stats.get("bytes_limit", pages)
    if needed > limit:
        raise UserError(
            f"parameters and optimizer state take {needed / 2**30:,.1f} GiB, but a device has "
            f"{limit / 2**30:,.1f} GiB; make config.model smaller."
        )
