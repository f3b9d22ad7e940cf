"""The right to write to a store: `StoreWriter` commits new versions and records the store's progress."""
