"""The configuration of the store under test; Feast's tests import this module by name.

This module imports nothing from Shoal, because it runs among Feast's tests: there, `tests` is Feast's own package. The
store comes from an environment variable that `__main__` sets.
"""

import json
import os
import shutil
import tempfile
from typing import Any

from tests.universal.feature_repos.universal.data_sources.file import FileDataSourceCreator

_STORE = json.loads(os.environ["FEAST_SUITE_STORE"])


class StoreUnderTest:
    """The store of one test, in a new directory. It replaces Feast's `OnlineStoreCreator`."""

    def __init__(self, project_name: str, **_: Any) -> None:
        self._directory = tempfile.mkdtemp(prefix=f"{project_name}-")

    def create_online_store(self) -> dict[str, Any]:
        """Return the store's configuration for a feature_store.yaml."""
        return {"type": _STORE["type"], _STORE["place"]: os.path.join(self._directory, "online")}

    def teardown(self) -> None:
        """Remove the files that the store leaves behind."""
        shutil.rmtree(self._directory, ignore_errors=True)


class _Offered(dict[str, Any]):
    """One store under several names. Tests for all stores run with it only once."""

    def values(self) -> Any:
        return [*super().values()][:1]


AVAILABLE_OFFLINE_STORES = [("local", FileDataSourceCreator)]
AVAILABLE_ONLINE_STORES = _Offered({name: ({"type": _STORE["type"]}, StoreUnderTest) for name in _STORE["offered_as"]})
