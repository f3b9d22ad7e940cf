"""Feast's online store on top of a Shoal store. `shoal.feast` exports the class."""
