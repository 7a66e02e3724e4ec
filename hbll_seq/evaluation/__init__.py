"""Perplexity by path, and the count of dependent evaluations."""
