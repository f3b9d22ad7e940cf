"""A damaged published file or pushed stream is either read or rejected with the expected error, and no process dies."""

import os
import subprocess
import sys

import pytest

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "200"))


@pytest.mark.parametrize("what", ["parquet", "arrow"])
def test_a_file_that_is_bent_anywhere_is_read_or_refused(what: str) -> None:
    """The reads run in a separate process, because a parser may crash it. The last line names the example."""
    command = [sys.executable, "-m", "tests.loaders.bent_files", what, "0", str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit code {done.returncode} at {last}\n{done.stderr}"
    assert "'read'" in last[0]
    assert "'refused'" in last[0]
