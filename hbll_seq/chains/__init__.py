"""Layers as chains for the engine: over depth, over time, and both."""
