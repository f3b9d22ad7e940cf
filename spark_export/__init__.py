"""Shoal's exporter: it uses Spark to find the changes in a view's source, and publishes them to an export root."""
