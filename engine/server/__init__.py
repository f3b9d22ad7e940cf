"""The server: HTTP and gRPC workers, their settings, and `run.run`, which starts a server."""
