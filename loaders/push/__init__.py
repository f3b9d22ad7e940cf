"""Apply pushed rows: resolve them key by key and commit them in groups."""
