"""Errors that a user can cause: each a single line with what was got, what was expected, what to do."""


class UserError(Exception):
    """Ends the program with its message on one line and `exit_status`."""

    exit_status = 1


class UsageError(UserError):
    """The command line, the config or the data."""

    exit_status = 2


class RunError(UserError):
    """The workdir, a checkpoint, the disk, or training itself."""


def unwritable(path: object, error: OSError) -> RunError:
    """What to raise for an `error` when writing to `path`."""
    return RunError(
        f"{path}: got {error.strerror or error}; expected room and permission to write there. "
        f"With that put right, the same command continues; or choose another --workdir."
    )


class Interrupted(Exception):
    """Training stopped for a signal, after it saved.

    Attributes:
      exit_status: of the process.
      said: whether this process is the one to say so.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}, which is saved; the same command resumes")
        self.exit_status = 128 + signum
        self.said = True
