"""Dynamic batching: a queue of requests as data, a policy, one loop, and an engine that runs it in chunks."""
