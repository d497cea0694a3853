"""Files that are written when long work is done."""

from pathlib import Path

from ..errors import InvalidRequest


def check_file(path: str | Path) -> None:
    """Refuses, before the work, a path that nothing could be written to; makes the folders above it.

    Raises:
        InvalidRequest: If it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.resolve().unlink()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written ({error}); name another file.") from error
