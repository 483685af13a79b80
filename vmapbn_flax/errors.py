"""Errors that a user can cause. Each message is one line: what is wrong, what would be right, what to do."""


class UserError(Exception):
    """Ends the program with its message on one line and `exit_status`."""

    exit_status = 1


class UsageError(UserError):
    """An error in the command line, the config or the data."""

    exit_status = 2


class RunError(UserError):
    """An error of the workdir, a checkpoint, the disk, or training itself."""


def unwritable(path: object, error: OSError) -> RunError:
    """The error to raise when writing to `path` failed with `error`."""
    return RunError(
        f"{path}: got {error.strerror or error}; expected room and permission to write there. "
        f"Provide them and run the same command again, or choose another place."
    )


def described(error: OSError) -> str:
    """The line of an `error` of the operating system that nothing else has put in words."""
    where = error.filename or "the operating system"
    return f"{where}: got {error.strerror or error}; expected to read or write there"


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), "no message")[:200]


class Interrupted(Exception):
    """A signal stopped training, and the state is saved.

    Attributes:
      exit_status: of the process.
      said: whether this process is the one to say so.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}, which is saved; the same command resumes")
        self.exit_status = 128 + signum
        self.said = True
