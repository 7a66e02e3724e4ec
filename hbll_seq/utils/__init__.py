"""Helpers that know nothing of models: files, values, seeds, tensors, console."""
