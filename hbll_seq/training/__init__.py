"""A training run: settings, loop, checkpoints, the run's folder and figures. ``train/lm.py`` puts them together."""
