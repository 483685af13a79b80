"""Errors that a user can cause: each a single line with what was got, what was expected, what to do."""


class UserError(Exception):
    """Ends the program with its message on one line and `exit_status`."""

    exit_status = 1


class UsageError(UserError):
    """The command line, the config or the data."""

    exit_status = 2


class RunError(UserError):
    """The workdir, a checkpoint, the disk, or training itself."""
