"""The binary tree over a chain: topology, posterior, and the paper's Algorithm 1."""
