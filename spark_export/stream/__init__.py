"""Streams: Spark reads events as they come, and publishes each micro-batch as a delta or pushes it to a server."""
