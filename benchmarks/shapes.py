"""The shapes that benchmarks name: CONFIGS["8B"], CONFIGS["1B"], CONFIGS["135M"], and "tiny" to try a script."""

from models.shapes import CONFIGS

__all__ = ["CONFIGS"]
