"""Describe a store and its processes: freshness, replication lag, scrub progress and memory, as plain documents."""
