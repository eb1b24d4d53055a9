"""Strategies over the paging verbs: a model protocol, one step, sampling, and the generation loop."""
