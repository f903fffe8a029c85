"""Ctrl-C and SIGTERM: the step in flight ends and is saved before the process does."""

import logging
import signal

log = logging.getLogger("attn_cnn")


class Interrupt:
    """While entered, the first Ctrl-C or SIGTERM sets `signal`; a second one stops the process at once."""

    def __init__(self):
        self.signal: int = 0
        self._former = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
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
