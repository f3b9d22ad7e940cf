"""Shoal's exporter: Spark finds what changed in a view's source and publishes it to an export root."""
