"""What Spark says when something fails, cut down to the sentence that a user can act on."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column
from pyspark.sql import functions as F

from engine.errors import ShoalError, SourceError

SPARK_ERRORS = (PySparkException, Py4JError)


_DECORATION = re.compile(r"^[\w.$]+(?:Exception|Error): (?=\[)|\s*SQLSTATE: \w+;?")

_SOURCE_ERROR = f"{SourceError.__module__}.{SourceError.__qualname__}: "
"""What is before the message of an error that a row of a source makes Spark raise."""


def raise_source_error(message: Column) -> Column:
    """Return a column without a value: a job that evaluates it fails, and `raised_as` raises that as SourceError."""
    return F.raise_error(F.concat(F.lit(_SOURCE_ERROR), message))


def brief(error: Exception) -> str:
    """The first sentence of what Spark said, and its root cause."""
    text = str(error.java_exception) if isinstance(error, Py4JJavaError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # A task in Python shows where it was before it says what was wrong.
    if told := [line for line in lines if line.startswith(f"{ShoalError.__module__}.")]:
        return told[-1].partition(": ")[2]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    if not causes and isinstance(error, Py4JJavaError):
        causes = _causes(error.java_exception)
    first = _DECORATION.sub("", lines[0])
    return f"{first} ({causes[-1]})" if causes else first


def _causes(exception: Any) -> list[str]:
    """The first lines of what led to an exception of Java's, the root cause last."""
    causes: list[str] = []
    while (exception := exception.getCause()) is not None:
        causes.append(str(exception.toString()).partition("\n")[0])
    return causes


@contextmanager
def raised_as(
    kind: type[ShoalError], what: str, hint_of: Callable[[str], str | None] = lambda said: None
) -> Iterator[None]:
    """Raise Spark's errors as errors of Shoal. The message has `what`, Spark's message, and the hint of `hint_of`. An
    error of `raise_source_error` is raised as SourceError, unchanged."""
    try:
        with source_errors():
            yield
    except SPARK_ERRORS as error:
        said = brief(error)
        hint = hint_of(said)
        raise kind(f"{what}: {said}" + (f"; {hint}" if hint else "")) from error


@contextmanager
def source_errors() -> Iterator[None]:
    """Raise what `raise_source_error` made Spark raise as SourceError, and nothing else."""
    try:
        yield
    except SPARK_ERRORS as error:
        said = str(error.java_exception) if isinstance(error, Py4JJavaError) else str(error)
        _, is_one, message = said.partition(_SOURCE_ERROR)
        if is_one:
            raise SourceError(_DECORATION.sub("", message.splitlines()[0])) from error
        raise
