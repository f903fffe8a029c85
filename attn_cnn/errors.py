"""The exceptions that are addressed to the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, with the value, and what to do.

    The commands print the message alone and exit with status 1. It is deliberately no ValueError:
    ml_collections and absl would wrap one in their own words and a stack.
    """


def first_line(error: Exception) -> str:
    """Returns what a foreign exception says, short enough to be part of a message."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]


class Stopped(Exception):
    """A signal ended the run early, with everything saved; the exit status is 128 + `signal`."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
