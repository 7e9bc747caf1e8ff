"""All that an untrusted answer can read of this project.

The modules import the standard library and each other, and numpy only inside a function that has met a numpy value.
"""

__all__ = ["codec", "confinement", "process"]
