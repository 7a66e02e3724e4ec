"""Text, tokens, windows, and synthetic tasks."""
