"""Feast's online store on a Shoal store: `type: shoal.feast.ShoalOnlineStore` in feature_store.yaml."""

from shoal.loaders.feast.online_store import ShoalOnlineStore as ShoalOnlineStore
from shoal.loaders.feast.online_store import ShoalOnlineStoreConfig as ShoalOnlineStoreConfig

__all__ = ["ShoalOnlineStore", "ShoalOnlineStoreConfig"]
