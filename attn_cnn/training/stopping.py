"""Who decides to stop: a signal to any host stops all hosts at the same step, which is saved first."""

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from attn_cnn.training import devices

log = logging.getLogger("attn_cnn")


# Ctrl-C, the end of a terminal, and what batch systems send before they kill.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def listen(handle: Callable[[int, Any], None]) -> dict[signal.Signals, Any]:
    """Lets `handle` take `SIGNALS`, and returns what took each before, for `restore`.

    Python takes signals on the main thread only: called on another, it leaves them alone. Signals that are ignored, as
    SIGHUP under nohup, stay so.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    heard = [number for number in SIGNALS if on_main_thread and signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in heard}


def restore(former: dict[signal.Signals, Any]) -> None:
    """Gives signals back to what took them before `listen`."""
    for number, handler in former.items():
        signal.signal(number, handler)


class Interrupt:
    """Listens for signals while entered: the first sets `signal`, and a Ctrl-C after it stops at once.

    That Ctrl-C raises KeyboardInterrupt, which a notebook survives. Any other later signal changes nothing: Slurm's
    reaches a run twice where its parent passes it on, too.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self):
        self._former = listen(self._receive)
        return self

    def __exit__(self, *_):
        restore(self._former)

    def _receive(self, number, _):
        if self.signal:
            return
        self.signal = number
        if signal.SIGINT in self._former:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("%s: saving, then stopping.", signal.Signals(number).name)


def _total(state: tuple, same: tuple, wish: Int[Array, ""]) -> Int[Array, ""]:
    return jax.lax.psum(wish, devices.AXIS)


class Vote:
    """Lets all hosts agree on whether to stop: each votes after every step, and all read the votes of the step before.

    Reading the votes of the step itself would make the host wait for the device.
    """

    def __init__(self, interrupt: Interrupt):
        self._interrupt = interrupt
        self._count: Callable | None = devices.mapped(_total) if jax.process_count() > 1 else None
        self._votes: Array | None = None

    def agreed(self) -> bool:
        """Votes, and returns whether all hosts stop here; each calls it after the same steps."""
        wish = bool(self._interrupt.signal)
        if self._count is None:
            return wish
        wishes = devices.distribute(np.full(jax.local_device_count(), wish, np.int32))
        former, self._votes = self._votes, self._count((), (), wishes)
        return former is not None and int(former) > 0
