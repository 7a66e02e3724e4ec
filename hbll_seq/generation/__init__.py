"""Tokens drawn along any path: sampling, caches, decoding."""
