import subprocess
import sys

import pytest

COUNT = 500  # of each of the four kinds; `python -m tests.mutations` takes 10,000


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_no_mutant_is_accepted_raises_anything_foreign_or_takes_much_memory() -> None:
    command = [sys.executable, "-m", "tests.mutations", "--count", str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("ref", "mark", "recipe", "spill"))]
    assert len(rows) == 4
    assert all(row[row.index(str(COUNT)) :][:3] == [str(COUNT), "0", "0"] for row in rows)
    assert "no allocation over 64 MiB" in done.stdout
