"""A damaged chunk of a view gives its values or one error. No process dies, and no bytes from elsewhere are read."""

import os
import subprocess
import sys

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "150"))


def test_a_chunk_that_is_damaged_anywhere_is_read_or_refused() -> None:
    """The examples run in their own process, because a read beyond a chunk ends it. The last output line names the
    example."""
    command = [sys.executable, "-m", "tests.engine.turned_bits", "0", str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit code {done.returncode} at {last}\n{done.stderr}"
    for outcome in ("open read", "open refused", "merge refused", "json refused", "explain refused"):
        assert outcome in last[0], f"the damage is not of many kinds: {last}"
