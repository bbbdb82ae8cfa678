"""Errors that commands report in one line."""


class UserError(Exception):
    """An argument or a file cannot be used; the message is one line and names the remedy."""


class Interrupted(Exception):
    """Ctrl-C stopped a run after it was saved; the message says how to resume."""


class Diverged(UserError):
    """The loss or the weights of a training became infinite or NaN."""
