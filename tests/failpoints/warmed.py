"""Imported by the process that others are forked from, for its kernels to be there."""

from engine.kernels import warm

warm()
