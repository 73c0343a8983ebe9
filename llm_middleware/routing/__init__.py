"""Routing: which deployment answers a call, and what happens when it does not."""
