"""Parse views.yaml: views, their sources and limits, with line numbers in errors."""
