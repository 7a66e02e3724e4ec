"""A fuzz harness: every surface that reads what others wrote is given seeded hostile inputs, and judged.

By hand, from the repository: ``python -m tests.fuzz --count 2000``, or one input: ``python -m tests.fuzz --target config
--seed 123``. ``oracle`` says what is right, ``workers`` runs inputs under limits, the files ``*_targets`` make them, and
``documents``, ``files`` and ``values`` hold what is hostile.
"""
