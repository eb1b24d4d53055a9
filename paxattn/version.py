"""The one version of the distribution (paxattn, pallas_kernels and models move together)."""

__version__ = "0.1.0"
