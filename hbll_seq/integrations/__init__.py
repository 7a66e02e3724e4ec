"""Doors to other libraries, each loaded by its name alone: transformers and lm-evaluation-harness with the extra ``[hf]``,
Gradio with ``[demo]``."""
