"""Errors that are the user's to mend."""


class UserError(Exception):
    """Something given to a command cannot be used; the message is one line and says what to do."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C after it saved what it had; the message says how to go on."""


class Diverged(UserError):
    """A training whose loss or weights became infinite or NaN."""
