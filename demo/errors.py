"""The demo's only own error; all others come from Shoal or the operating system."""


class DemoFailed(Exception):
    """A step failed, or a result is wrong. The message gives the cause, and the demo ends."""
