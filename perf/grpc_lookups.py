"""Lookups over gRPC, as Feast's clients send them. Import this module only if gRPC's packages are installed."""

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from perf.answers import Matrix
from perf.dataset import Dataset, document_keys
from tests.server.feast_messages import decode, encode

_METHOD = "/feast.serving.ServingService/GetOnlineFeatures"
_PATIENCE_SECONDS = 60.0


class Channel:
    """A gRPC channel to a server."""

    def __init__(self, address: str) -> None:
        self._call = grpc.insecure_channel(address).unary_unary(_METHOD)

    def look_up(self, views: Sequence[Dataset], documents: npt.NDArray[np.int64]) -> tuple[int, Matrix]:
        """Look up all features of documents. Return the store version of the response, and float32[documents, features
        of all views].

        Raises:
            grpc.RpcError: the server did not answer, or answered with an error.
        """
        references = [reference for data in views for reference in data.references]
        keys = {"val": [{"string_val": key} for key in document_keys(documents)]}
        request: dict[str, Any] = {"features": {"val": references}, "entities": [{"key": "doc_id", "value": keys}]}
        sent = encode("GetOnlineFeaturesRequest", request | {"full_feature_names": True})
        answer, call = self._call.with_call(sent, timeout=_PATIENCE_SECONDS)
        version = dict(call.trailing_metadata())["x-shoal-version"]
        results = decode("GetOnlineFeaturesResponse", answer)["results"][-len(references) :]
        columns = [[value.get("float_val", np.nan) for value in result["values"]] for result in results]
        return int(version), np.array(columns, np.float32).T
