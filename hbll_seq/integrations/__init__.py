"""Doors to other libraries: transformers and lm-evaluation-harness. Each loads by its name alone, with the extra ``[hf]``."""
