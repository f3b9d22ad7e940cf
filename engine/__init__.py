"""Shoal's serving engine: the store's format, the kernels, the lookup path and the HTTP worker."""
