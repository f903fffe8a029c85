"""Several devices and several hosts: the one place where a step for one device becomes a step for all.

A step is written for one device with the named axis `AXIS`. Its last argument is the device's `Share`; all others
are the same on every device. A share says which places of the global batch are the device's, so nothing depends on
how devices are numbered across hosts.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from attn_cnn.errors import UserError

Result = TypeVar("Result")

log = logging.getLogger("attn_cnn")

AXIS = "devices"
HEARTBEAT_SECONDS = 60  # after which a host that fell silent ends the run on all others


class Share(NamedTuple):
    """What differs from device to device; with a leading axis of local devices outside the step."""

    positions: Int[Array, "*devices share"]
    stop: Int[Array, "*devices"]  # 1 where the device's process was asked to stop


def mapped(step: Callable, arguments: int, donate: tuple[int, ...] = ()) -> Callable:
    """`step`, a function of `arguments` arguments, on all devices at once."""
    in_axes = (None,) * (arguments - 1) + (0,)
    # To leave pmap: jax.jit(jax.shard_map(step, mesh=..., in_specs=..., out_specs=P()), donate_argnums=donate)
    return jax.pmap(step, axis_name=AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donate)


def _local_sharding(*spec: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(*spec))


def replicate(tree: Any) -> Any:
    """The same arrays on each of this process's devices."""
    return jax.device_put(tree, _local_sharding())


def share(batch_size: int, stop: bool = False) -> Share:
    """The shares of this process's devices in a batch of `batch_size` images.

    Raises:
      UserError: the devices cannot share the batch evenly.
    """
    check_batch_size(batch_size, jax.device_count())
    local = jax.local_device_count()
    places = np.arange(batch_size, dtype=np.int32).reshape(jax.process_count(), local, -1)
    shares = Share(places[jax.process_index()], np.full(local, stop, np.int32))
    return jax.device_put(shares, _local_sharding(AXIS))


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None):
    """Joins the other hosts: those named, else those of a cluster that JAX can find, else none.

    Raises:
      UserError: the flags are incomplete, or the hosts do not find each other.
    """
    given = (coordinator_address, num_processes, process_id)
    alone = all(flag is None for flag in given)
    if not alone and any(flag is None for flag in given):
        raise UserError("several hosts need all of --coordinator_address, --num_processes and --process_id.")
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        no_cluster = "coordinator_address should be defined" in str(error)
        if not (alone and no_cluster):
            raise UserError(f"these hosts cannot form a cluster: {error}") from None
    except RuntimeError as error:
        raise UserError(f"the hosts do not find each other: {error}") from None
    if jax.process_index() > 0:  # all hosts do the same: one of them tells
        log.setLevel(logging.WARNING)


def on_every_host(work: Callable[[], Result]) -> Result:
    """`work` on each host; where it fails on some, it fails on all, and none waits for the others in vain.

    Raises:
      UserError: of this host's `work`, or naming the hosts that failed.
    """
    try:
        result, failure = work(), None
    except UserError as error:
        result, failure = None, error
    failed = everywhere(failure is not None)
    if failure is not None:
        raise failure
    if failed.any():
        raise UserError(f"process {', '.join(map(str, np.flatnonzero(failed)))} cannot go on; its log says why.")
    return result


def everywhere(value: bool | int) -> Int[np.ndarray, "processes"]:
    """Each process's value, known to all."""
    if jax.process_count() == 1:
        return np.array([int(value)])
    return np.asarray(multihost_utils.process_allgather(np.int32(value))).reshape(-1)


def check_batch_size(batch_size: int, devices: int) -> None:
    """Raises UserError, with the nearest sizes that fit, unless `devices` divides `batch_size`."""
    if batch_size % devices:
        below = batch_size // devices * devices
        sizes = " or ".join(str(s) for s in (below, below + devices) if s)
        raise UserError(
            f"config.batch_size is {batch_size}, which {devices} devices cannot share evenly; "
            f"the nearest that they can: {sizes}."
        )


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
