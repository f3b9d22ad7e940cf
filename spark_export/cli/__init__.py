"""The commands `shoal export`, `shoal feast-views` and `shoal stream`."""
