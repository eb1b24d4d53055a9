"""Tests mirror the packages; toys, golden outputs and mutants stand beside them."""
