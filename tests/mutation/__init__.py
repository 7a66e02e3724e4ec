"""Mutants of the library, and whether the tests see them: ``python -m tests.mutation --targets objectives --count 50``.

Made here because mutmut and cosmic-ray know no ``detach()`` or ``no_grad`` left out, no ``mean`` for ``sum`` and no statement
deleted, which wrong losses are made of; the one draws no sample, the other starts a process with torch for every mutant.
"""
