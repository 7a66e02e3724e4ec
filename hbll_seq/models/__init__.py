"""Models with a configuration: what is saved, shared and deployed."""
