"""The one exception that is addressed to the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, with the value, and what to do.

    main.py prints the message alone and exits with status 1. It is deliberately no ValueError:
    ml_collections and absl would wrap one in their own words and a stack.
    """
