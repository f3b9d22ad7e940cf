"""The formats of answers: one file per format, each with a pure function from a result to bytes."""
