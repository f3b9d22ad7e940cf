"""Read Feast repositories, and compare a store with a Feast server."""
