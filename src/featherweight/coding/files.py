"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from featherweight.errors import BadOption


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside the target, flushes to the disk, then renames: a reader never sees half a file.

    Raises:
        BadOption: the folder does not exist, cannot be written or is full; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        _forget(beside)
        reason = error.strerror or str(error)
        raise BadOption(f"cannot write {path}: {reason}; choose a folder that exists and has room") from None
    except BaseException:
        _forget(beside)
        raise
    _settle(path.parent)


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself is gone or closed: there is nothing of ours to remove
        return


def _settle(folder: Path) -> None:
    """Makes the rename itself survive a loss of power, where the system can say so of a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # some file systems cannot flush a folder; the file itself is safe
        pass
    finally:
        os.close(handle)
