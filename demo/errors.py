"""The one error of the demo's own; all others are Shoal's, or the operating system's."""


class DemoFailed(Exception):
    """Something is not as it should be; the message says what, and the demo ends."""
