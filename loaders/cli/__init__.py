"""The commands that write to a store."""
