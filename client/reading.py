"""Parse and validate servers' responses: a response must match the request before it is used.

An invalid response always raises AnswerInvalid, never another exception.
"""

import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.client.answers import Answer, JsonAnswer, MatrixAnswer, Position
from shoal.client.errors import AnswerInvalid
from shoal.client.wire import APPLIED_HEADER, PARTIAL_HEADER, VERSION_HEADER, Response, split_reference

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, StopIteration, struct.error, MemoryError)
"""The exceptions that parsing invalid bytes can raise."""
_NPY = b"\x93NUMPY\x01\x00"
_NPY_HEAD = re.compile(
    rb"\{'descr': '(<f4|<f8)', 'fortran_order': False, 'shape': \(([0-9]{1,18}), ([0-9]{1,18})\), \} *\n"
)
_NUMBER = re.compile(r"[0-9]{1,18}")
_POSITION = re.compile(r"([^=,@ ]+)=(-?[0-9]{1,18})@([^=,@ ]*)")
"""A position in the header X-Shoal-Applied: VIEW=SEQ@ID. The id is empty for a view without log entries, such as a view
outside of all export roots."""
_SHOWN_BYTES = 100


def read_answer(response: Response, form: str, keys: int, references: Sequence[str] | None) -> Answer:
    """Return the answer to a lookup of some number of keys.

    Args:
        form: the requested format.
        references: the requested features, in order; None if only the server knows them.

    Raises:
        AnswerInvalid: the response cannot be parsed, or its rows or features are not the requested ones.
    """
    try:
        version = _number(response.headers.get(VERSION_HEADER, ""))
        applied = dict(parse_applied(response.headers.get(APPLIED_HEADER, "")))
        partial = tuple(filter(None, response.headers.get(PARTIAL_HEADER, "").split(",")))
        match form:
            case "arrow":
                from shoal.client.arrow import ArrowAnswer, read_batch

                batch = read_batch(response.body)
                names = batch.schema.names  # Raises if a name is not UTF-8.
                _compare("rows", batch.num_rows, keys)
                if references is not None:
                    _compare("features", names, list(references))
                return ArrowAnswer(version, applied, partial, batch, response.body)
            case "npy":
                matrix = read_npy(response.body)
                _compare("rows", len(matrix), keys)
                if references is not None and matrix.shape[1] < len(references):
                    _compare("columns", matrix.shape[1], len(references))
                return MatrixAnswer(version, applied, partial, matrix)
            case _:
                document = _read_features(response.document, keys)
                if references is not None:
                    _compare("features", list(document["features"]), list(dict.fromkeys(references)))
                return JsonAnswer(version, applied, partial, document)
    except _UNREADABLE as error:
        raise AnswerInvalid(f"{response.address} sent an invalid answer: {type(error).__name__}: {error}") from error


def _compare(what: str, found: Any, asked: Any) -> None:
    if found != asked:
        raise ValueError(f"the {what} are {found}, but {asked} were requested")


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """Return the matrix of a .npy file of version 1.0, as a view of its bytes; raise ValueError or struct.error if the
    bytes are invalid."""
    if not data.startswith(_NPY):
        raise ValueError("it is not a .npy file of version 1.0")
    (length,) = struct.unpack_from("<H", data, len(_NPY))
    start = len(_NPY) + 2 + length
    dtype, shape = _read_head(data[len(_NPY) + 2 : start])
    if shape[0] * shape[1] * dtype.itemsize != len(data) - start:
        raise ValueError(f"it has {len(data) - start} bytes of numbers, but its head says {shape} of {dtype}")
    return np.ndarray(shape, dtype, data, start)


@lru_cache(maxsize=256)
def _read_head(data: bytes) -> tuple[np.dtype[Any], tuple[int, int]]:
    """Return the type and shape in the head of a .npy file. The result is cached, because answers of the same size have
    the same head."""
    head = _NPY_HEAD.fullmatch(data)
    if head is None:
        raise ValueError(f"its head is {data[:_SHOWN_BYTES]!r}")
    return np.dtype(head[1].decode()), (int(head[2]), int(head[3]))


def _read_features(document: Any, keys: int) -> dict[str, Any]:
    features, statuses, times = members = [document[name] for name in ("features", "status", "event_timestamps")]
    if not all(isinstance(member, dict) for member in members):
        raise TypeError("features, status or event_timestamps is not an object")
    if not {split_reference(reference)[0] for reference in features} <= statuses.keys() & times.keys():
        raise ValueError("a view with features has no statuses or no event times")
    for column in (*features.values(), *statuses.values(), *times.values()):
        if not isinstance(column, list):
            raise TypeError("a column is not a list")
        _compare("rows", len(column), keys)
    return dict(document)


@lru_cache(maxsize=256)
def parse_applied(text: str) -> dict[str, Position]:
    """Return view → position, from the header X-Shoal-Applied; raise ValueError if the text is invalid."""
    positions = {}
    for part in text.split(", ") if text else ():
        found = _POSITION.fullmatch(part)
        if found is None:
            raise ValueError(f"{part!r} is not a position in a log")
        positions[found[1]] = Position(int(found[2]), found[3])
    return positions


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"the version is {text!r}")
    return int(text)


def read_pushed(response: Response, sent: int) -> tuple[int, int, int]:
    """Return the content of the answer to a push: the number of rows, the number of superseded rows, and the first
    version in which the other rows are visible. Raise AnswerInvalid if the answer is invalid."""
    try:
        answer = response.document
        rows, superseded, version = (answer[member] for member in ("rows", "superseded", "version"))
        if any(type(number) is not int for number in (rows, superseded, version)) or not 0 <= superseded <= rows:
            raise ValueError
        if rows != sent:
            raise AnswerInvalid(f"{response.address} confirms {rows} rows of a push, but {sent} were sent")
    except _UNREADABLE as error:
        shown = response.body[:_SHOWN_BYTES]
        raise AnswerInvalid(f"{response.address} sent an invalid answer to a push: {shown!r}") from error
    return rows, superseded, version


def read_document(response: Response, members: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON object in an answer; raise AnswerInvalid if it is not an object, or lacks one of the members."""
    try:
        document = response.document
    except ValueError as error:
        raise AnswerInvalid(f"{response.address} sent invalid JSON: {error}") from None
    if not isinstance(document, dict) or not document.keys() >= set(members):
        wanted = f"an object with {', '.join(members)}" if members else "an object"
        raise AnswerInvalid(f"{response.address} sent {response.body[:_SHOWN_BYTES]!r}, but {wanted} was expected")
    return document
