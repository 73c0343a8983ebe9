"""Answers to questions that were asked before in other words, and how sure one can be of them."""
