"""What only this user can read: keys, recipes, which hold prompts, and KV that was made of them."""

import os

FOLDER = 0o700  # mode


def private(path: str, flags: int) -> int:
    """The opener of such a file, for `open`."""
    return os.open(path, flags, 0o600)


def flush(folder: str | os.PathLike[str]) -> None:
    """Has the disk know which files are in a folder; when this returns, a crash changes nothing about that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
