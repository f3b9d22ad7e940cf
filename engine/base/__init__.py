"""Errors, failpoints, quoting, times, durations and shards. Every other package may import this package. This package
imports no other package of Shoal."""
