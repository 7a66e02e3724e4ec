"""Chains of transitions solved in parallel: forward iterations, adjoints, Jacobian approximations.

It knows no layer, no time and no tree.
"""
