"""SHA-256 sums of a checkpoint's files, which show damage; orbax has no sums."""

import hashlib
from pathlib import Path

from vmapbn_flax.files import read_file, write_whole

_SUMS = "SHA256"  # for `sha256sum --check`


def write_sums(path: Path) -> None:
    """Writes the SHA-256 of each file of the checkpoint `path` into the checkpoint."""
    write_whole(path / _SUMS, "".join(f"{sha}  {name}\n" for name, sha in _file_sums(path).items()))


def require_whole(path: Path) -> None:
    """Refuses a checkpoint with a changed file.

    orbax would notice most damage, but its threads print tracebacks then.

    Raises:
      ValueError: a file is missing, superfluous, changed, or a pipe or a device, which might never end.
      OSError: the sums cannot be read.
    """
    if strays := [entry.name for entry in path.rglob("*") if not (entry.is_file() or entry.is_dir())]:
        raise ValueError(f"{strays[0]} is no file")
    lines = [line.partition("  ") for line in read_file(path / _SUMS).decode().splitlines()]
    saved, found = {name: sha for sha, _, name in lines}, _file_sums(path)
    for name in sorted({*saved, *found}):
        if saved.get(name) != found.get(name):
            raise ValueError(f"{name} is {'not what was saved' if name in found else 'missing'}")


def _file_sums(path: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, by its relative path."""
    files = sorted(file for item in ("meta", "state") for file in (path / item).rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
