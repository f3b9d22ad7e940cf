"""The OpenAPI document of the HTTP interface, as GET /openapi.json answers it: `openapi.json` beside this file."""

from importlib.resources import files

DOCUMENT: bytes = files(__package__).joinpath("openapi.json").read_bytes()
"""JSON, in UTF-8."""
