"""Run the command line: `shoal`, or `python -m shoal`."""

import sys


def run() -> None:
    """Run the command line. If the packages of a server are not installed, say which to install and exit with 1."""
    try:
        from shoal.cli import main
    except ModuleNotFoundError as error:
        message = f"the commands need {error.name}, which is not installed: pip install 'shoal[server]'"
        print(f"shoal: {message}", file=sys.stderr)
        sys.exit(1)
    main()


if __name__ == "__main__":
    run()
