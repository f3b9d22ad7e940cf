"""The formats of answers: a file a format, each a pure function from a LookupResult to bytes."""
