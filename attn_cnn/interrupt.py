"""Ctrl-C and SIGTERM: the step in flight ends and is saved before the process does."""

import logging
import signal
import threading

log = logging.getLogger("attn_cnn")


class Interrupt:
    """While entered, the first Ctrl-C or SIGTERM sets `signal`; a second one stops the process at once.

    Python takes signals on the main thread only: entered on another, it leaves them alone.
    """

    def __init__(self):
        self.signal: int = 0
        self._former = {}

    def __enter__(self):
        on_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if on_main_thread else ():
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        self.signal = number
        for former in self._former:
            signal.signal(former, signal.SIG_DFL)
        log.info("%s: saving, then stopping.", signal.Signals(number).name)
