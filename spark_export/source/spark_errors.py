"""Spark's errors, shortened to the sentence that a user can act on."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column
from pyspark.sql import functions as F

from shoal.engine.base.errors import ShoalError, SourceError

SPARK_ERRORS = (PySparkException, Py4JError)


_DECORATION = re.compile(r"^[\w.$]+(?:Exception|Error): (?=\[)|\s*SQLSTATE: \w+;?")

_SOURCE_ERROR = f"{SourceError.__module__}.{SourceError.__qualname__}: "
"""The prefix of an error message if a row of a source caused the error."""


def raise_source_error(message: Column) -> Column:
    """Return a column that makes a Spark job fail when the column is evaluated. `raised_as` turns this failure into a
    SourceError."""
    return F.raise_error(F.concat(F.lit(_SOURCE_ERROR), message))


def brief(error: Exception) -> str:
    """Return the first line of Spark's message, followed by the root cause in parentheses."""
    text = str(error.java_exception) if isinstance(error, Py4JJavaError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # In an error of a Python task, the traceback comes before the message.
    if named := [line for line in lines if line.startswith(f"{ShoalError.__module__}.")]:
        return named[-1].partition(": ")[2]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    if not causes and isinstance(error, Py4JJavaError):
        causes = _causes(error.java_exception)
    first = _DECORATION.sub("", lines[0])
    return f"{first} ({causes[-1]})" if causes else first


def _causes(exception: Any) -> list[str]:
    """Return the first line of each cause of a Java exception, the root cause last."""
    causes: list[str] = []
    while (exception := exception.getCause()) is not None:
        causes.append(str(exception.toString()).partition("\n")[0])
    return causes


@contextmanager
def raised_as(
    kind: type[ShoalError], what: str, hint_of: Callable[[str], str | None] = lambda said: None
) -> Iterator[None]:
    """Raise Spark's errors as errors of class `kind`. The message consists of `what`, Spark's message, and the hint of
    `hint_of`. An error of `raise_source_error` is raised as SourceError, with its own message."""
    try:
        with source_errors():
            yield
    except SPARK_ERRORS as error:
        said = brief(error)
        hint = hint_of(said)
        raise kind(f"{what}: {said}" + (f"; {hint}" if hint else "")) from error


@contextmanager
def source_errors() -> Iterator[None]:
    """Raise an error of `raise_source_error` as SourceError. Do not change other errors."""
    try:
        yield
    except SPARK_ERRORS as error:
        said = str(error.java_exception) if isinstance(error, Py4JJavaError) else str(error)
        _, is_one, message = said.partition(_SOURCE_ERROR)
        if is_one:
            raise SourceError(_DECORATION.sub("", message.splitlines()[0])) from error
        raise
