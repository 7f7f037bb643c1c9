"""Rows of `results/` as tables and plots of the documentation."""
