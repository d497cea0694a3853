"""What only this user can read: keys, recipes, which hold prompts, and KV that was made of them."""

import os

FOLDER = 0o700  # mode


def private(path: str, flags: int) -> int:
    """The opener of such a file, for `open`."""
    return os.open(path, flags, 0o600)
