"""Shoal's serving engine: the store's format, the kernels, the lookup path and the HTTP worker."""

from engine.feature_store import FeatureStore
from engine.result import LookupResult

__all__ = ["FeatureStore", "LookupResult"]
