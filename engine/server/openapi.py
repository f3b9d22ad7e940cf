"""The OpenAPI document of the HTTP interface, for GET /openapi.json: the file `openapi.json` in this directory."""

from importlib.resources import files

DOCUMENT: bytes = files(__package__).joinpath("openapi.json").read_bytes()
"""JSON, in UTF-8."""
