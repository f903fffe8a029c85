"""What a run finds to compute on: this machine's devices and other hosts.

Whatever the environment says of them ends in a run, or in one message.
"""

import contextlib
import glob
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping

import jax

from attn_cnn.errors import UserError, first_line

log = logging.getLogger("attn_cnn")

JOIN_SECONDS = 300  # in which all hosts have to be there
HEARTBEAT_SECONDS = 60  # after which a host that fell silent ends the run on all others
ALONE = "To run on this machine alone, add --num_processes=1."


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other hosts (those named, else those of a cluster that JAX can find, else none) and finds devices.

    Raises:
      UserError: the flags are incomplete, the hosts do not find each other, or JAX has no device of the kind asked for.
    """
    given = (coordinator_address, num_processes, process_id)
    if num_processes != 1:
        _join(given)
    elif coordinator_address is not None or process_id not in (None, 0):
        raise UserError("--num_processes is 1, which needs neither --coordinator_address nor --process_id.")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX finds no device to compute on; JAX_PLATFORMS is {asked!r}. Unset it, or install JAX for that device, "
            f"as in {install_line(asked)}. {first_line(error)}"
        ) from None
    if jax.process_index() > 0:  # all hosts do the same: one of them tells
        log.setLevel(logging.WARNING)


def _join(given: tuple[str | None, int | None, int | None]) -> None:
    address, processes, number = given
    alone = all(flag is None for flag in given)
    if not alone:
        if address is None or processes is None or number is None:
            raise UserError("several hosts need all of --coordinator_address, --num_processes and --process_id.")
        if not 0 <= number < processes:
            raise UserError(f"--process_id is {number}; of {processes} processes it must be from 0 to {processes - 1}.")
    try:
        with warnings.catch_warnings(record=True) as told, _giving_up_with_a_message(address):
            jax.distributed.initialize(
                *given,
                local_device_ids=slurm_devices(os.environ),
                initialization_timeout=JOIN_SECONDS + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except Exception as error:  # of JAX, the network, or the cluster's own interface, each with types of its own
        no_cluster = isinstance(error, ValueError) and "coordinator_address should be defined" in str(error)
        if not (alone and no_cluster):
            raise UserError(f"the hosts do not find each other: {first_line(error)}. {ALONE}") from None
    for warning in told:
        log.warning("%s", " ".join(str(warning.message).split()))


@contextlib.contextmanager
def _giving_up_with_a_message(address: str | None) -> Iterator[None]:
    """Ends the process with a message if the hosts have not met in time, before JAX aborts it with a stack."""

    def give_up():
        where = f"at {address}" if address else "where the cluster's variables say"
        print(
            f"error: the hosts do not find each other: not all of them met {where} in {JOIN_SECONDS} s. Start the same "
            f"command on every host, and let all of them reach the first. {ALONE}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread is inside JAX, where no exception reaches it

    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of a Slurm task that has a node to itself, of which JAX would take the first alone."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    if "SLURM_LOCALID" not in environment or tasks != "1":
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    return list(range(count)) if count > 1 else None


def install_line(platform: str) -> str:
    """Returns the command that installs JAX for a kind of device."""
    return f'pip install -U "jax[{"tpu" if platform == "tpu" else "cuda13"}]"'


def log_devices() -> None:
    """Logs what the run computes on, and warns of an accelerator that the machine has and JAX does not use."""
    devices = jax.devices()
    log.info(
        "On %d %s device%s (%s), %d process%s.",
        len(devices),
        jax.default_backend().upper(),
        "s" * (len(devices) > 1),
        devices[0].device_kind,
        jax.process_count(),
        "es" * (jax.process_count() > 1),
    )
    if jax.default_backend() == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        for name, platform in unused_accelerators().items():
            log.warning("This machine has %s, which JAX does not use: %s", name, install_line(platform))


def unused_accelerators() -> dict[str, str]:
    """Returns the accelerators that this machine shows signs of, with JAX's names for their platforms."""
    found = {}
    if glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi"):
        found["an NVIDIA GPU"] = "cuda"
    if glob.glob("/dev/accel[0-9]*") or os.environ.get("TPU_NAME") or os.environ.get("TPU_WORKER_ID"):
        found["a TPU"] = "tpu"
    return found
