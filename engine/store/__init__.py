"""Open a store and read one version of it: the LMDB environment, segments and `StoreVersion`."""
