"""Shoal: an online feature store serving engine for ranking.

The names in `__all__`, the errors in `shoal.errors`, the client in `shoal.client` and the Feast online store in
`shoal.feast` are the public API. Everything else is private and may change in any release.

A name is imported when it is first used, so that `import shoal.client` does not import the engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.engine.feature_store import FeatureStore as FeatureStore
    from shoal.engine.format.schema import Feature as Feature
    from shoal.engine.format.schema import JoinKey as JoinKey
    from shoal.engine.format.schema import ViewSchema as ViewSchema
    from shoal.engine.lookup.result import LookupResult as LookupResult
    from shoal.engine.lookup.result import MatrixResult as MatrixResult
    from shoal.loaders.apply.definition import define_view as define_view
    from shoal.loaders.commit.store_writer import StoreWriter as StoreWriter
    from shoal.loaders.push.push import push_rows as push_rows

_MODULES = {
    "Feature": "shoal.engine.format.schema",
    "FeatureStore": "shoal.engine.feature_store",
    "JoinKey": "shoal.engine.format.schema",
    "LookupResult": "shoal.engine.lookup.result",
    "MatrixResult": "shoal.engine.lookup.result",
    "StoreWriter": "shoal.loaders.commit.store_writer",
    "ViewSchema": "shoal.engine.format.schema",
    "define_view": "shoal.loaders.apply.definition",
    "push_rows": "shoal.loaders.push.push",
}

__all__ = [
    "Feature",
    "FeatureStore",
    "JoinKey",
    "LookupResult",
    "MatrixResult",
    "StoreWriter",
    "ViewSchema",
    "define_view",
    "push_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"shoal.{name} needs {error.name}, which is not installed: pip install 'shoal[server]'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
