"""Check the promises of the store in a run of any length, or check that the checker finds planted bugs.

python -m tests.consistency --seconds 600
python -m tests.consistency --seconds 15 --planted all
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.consistency.planted import PLANTED
from tests.consistency.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.consistency", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--planted", choices=["all", *PLANTED], help="a bug that the server is to have, or all in turn")
    parser.add_argument("--directory", type=Path, help="where to leave the store, the log and the history")
    arguments = parser.parse_args()
    bugs: list[str | None] = [*PLANTED] if arguments.planted == "all" else [arguments.planted]
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        for bug in bugs:
            directory = (arguments.directory or Path(temporary)) / (bug or "run")
            directory.mkdir(parents=True)
            report = run(directory, arguments.seconds, planted=bug, kill=bug is None)
            print(f"{bug or 'no bug planted'}, {arguments.seconds:g} s\n{report}\n", flush=True)
            code |= bool(report.wrongs) is (bug is None)
    return code


if __name__ == "__main__":
    sys.exit(main())
