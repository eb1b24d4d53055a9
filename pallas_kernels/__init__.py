"""Paged attention over arrays: one definition, several implementations, picked by name."""

from pallas_kernels.api import IMPLEMENTATIONS, paged_attention

__all__ = ["IMPLEMENTATIONS", "paged_attention"]
