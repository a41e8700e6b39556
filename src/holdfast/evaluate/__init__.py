"""Evaluation on public suites, by any judge, calibrated against people's labels."""
