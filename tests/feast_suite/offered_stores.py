"""What Feast's tests are told of the store under test: they import this module by its name.

It runs among Feast's tests, where `tests` is Feast's own package, so that it imports nothing of Shoal. The store comes
from the environment, as `__main__` describes it there.
"""

import json
import os
import shutil
import tempfile
from typing import Any

from tests.universal.feature_repos.universal.data_sources.file import FileDataSourceCreator

_STORE = json.loads(os.environ["FEAST_SUITE_STORE"])


class StoreUnderTest:
    """The store of one test, in a directory that is new; in the place of Feast's `OnlineStoreCreator`."""

    def __init__(self, project_name: str, **_: Any) -> None:
        self._directory = tempfile.mkdtemp(prefix=f"{project_name}-")

    def create_online_store(self) -> dict[str, Any]:
        """What a feature_store.yaml says of it."""
        return {"type": _STORE["type"], _STORE["place"]: os.path.join(self._directory, "online")}

    def teardown(self) -> None:
        """Remove what the store leaves behind."""
        shutil.rmtree(self._directory, ignore_errors=True)


class _Offered(dict[str, Any]):
    """One store by several names; tests that run with every store run with it once."""

    def values(self) -> Any:
        return [*super().values()][:1]


AVAILABLE_OFFLINE_STORES = [("local", FileDataSourceCreator)]
AVAILABLE_ONLINE_STORES = _Offered({name: ({"type": _STORE["type"]}, StoreUnderTest) for name in _STORE["offered_as"]})
