"""Shoal's serving engine. Import it as `shoal.engine`; the public names are those of `shoal`."""

if __name__ != "shoal.engine":
    raise ImportError(f"import shoal.engine instead of {__name__}: the package's name is shoal")
