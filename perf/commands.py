"""Run Shoal's commands in separate processes, as a user does, and measure their time and memory."""

import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Ran:
    """The result of a command: its output, its wall time in seconds, and its peak memory in bytes.

    The memory is sampled, and includes child processes. `peak_rss` includes shared pages such as mapped files;
    `peak_private` excludes them.
    """

    output: str
    seconds: float
    peak_rss: int
    peak_private: int


def run(*arguments: object, environment: dict[str, str] | None = None) -> Ran:
    """Run `shoal` with these arguments and additional environment variables.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "shoal", *map(str, arguments)]
    peak_rss = peak_private = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = psutil.Popen(command, stdout=output, stderr=errors, env=os.environ | (environment or {}))
        try:
            while process.poll() is None:
                rss, private = _memory(process)
                peak_rss = max(peak_rss, rss)
                peak_private = max(peak_private, private)
                with suppress(psutil.TimeoutExpired):
                    process.wait(SAMPLE_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        seconds = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-2000:]}")
        return Ran(output.read(), seconds, peak_rss, peak_private)


def _memory(process: psutil.Process) -> tuple[int, int]:
    rss = private = 0
    with suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory = member.memory_info()
                rss = rss + memory.rss
                private = private + memory.rss - memory.shared
    return rss, private
