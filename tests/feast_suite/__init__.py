"""Feast's own tests of an online store, run against Shoal's: see `__main__`."""
