"""Read the rows of a source with Spark, and check that they fit their view."""
