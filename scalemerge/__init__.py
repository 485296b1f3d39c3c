"""scalemerge: train text-embedding experts once, then learn the best single model among their task vectors.

Importing this package imports nothing heavy; each room is imported where it is needed.
"""

__version__ = "0.1.0"
