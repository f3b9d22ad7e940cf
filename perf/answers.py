"""Requests for all features of documents in each response format of Shoal, and their responses as matrices."""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from perf.dataset import Dataset, document_keys

Matrix = npt.NDArray[np.float32]


class Format(NamedTuple):
    """A response format: the path and the Accept header of a request, and additional members of its body. `read`
    converts a response to float32[documents, features of all views]."""

    path: str
    accept: str
    read: Callable[[bytes], Matrix]
    more: dict[str, Any]

    def body(self, views: Sequence[Dataset], documents: npt.NDArray[np.int64]) -> bytes:
        """Return the body of a request for all features of documents."""
        references = [reference for data in views for reference in data.references]
        asked = {"features": references, "entities": {"doc_id": document_keys(documents)}}
        return orjson.dumps(asked | self.more)


def _read_npy(content: bytes) -> Matrix:
    found: Matrix = np.load(io.BytesIO(content))
    return found


def _read_arrow(content: bytes) -> Matrix:
    with pa.ipc.open_stream(content) as stream:
        table = stream.read_all()
    return _from_columns([column.to_numpy() for column in table.columns])


def _read_json(content: bytes) -> Matrix:
    return _from_columns(list(orjson.loads(content)["features"].values()))


def _read_feast(content: bytes) -> Matrix:
    document = orjson.loads(content)
    named = zip(document["metadata"]["feature_names"], document["results"], strict=True)
    return _from_columns([result["values"] for name, result in named if name != "doc_id"])


def _from_columns(columns: Sequence[Any]) -> Matrix:
    return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)


FORMATS = (
    Format("/v1/lookup", "application/x-npy", _read_npy, {}),
    Format("/v1/lookup", "application/vnd.apache.arrow.stream", _read_arrow, {}),
    Format("/v1/lookup", "application/json", _read_json, {}),
    Format("/get-online-features", "application/json", _read_feast, {"full_feature_names": True}),
)
