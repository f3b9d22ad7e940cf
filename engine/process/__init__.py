"""The processes of a server: supervisor, handover, liveness, run directory, and the writer's control socket."""
