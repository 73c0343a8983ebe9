"""Providers: a table of who speaks OpenAI's API where, and the few functions for those who do not."""
