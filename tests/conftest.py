"""What holds for all tests."""

from hypothesis import settings

# A kernel is compiled when it is first called: no example is too slow for that.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")
