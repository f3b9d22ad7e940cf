"""The on-disk format of a store: row layout, schema, catalog, keys, seal and progress record."""
