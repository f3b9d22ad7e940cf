"""Feast's own online store tests, run against Shoal's online store; see `__main__`."""
