"""Streams: Spark reads events as they come, and each of its micro-batches becomes a delta, or is pushed to a server."""
