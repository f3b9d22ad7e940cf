"""Compile the kernels in the process from which others are forked."""

from shoal.engine.kernels import warm

warm()
