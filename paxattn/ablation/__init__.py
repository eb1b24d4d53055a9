"""A question about paging as one call: what is swept, how a run of a model or of a bare pool is measured, a picture."""
