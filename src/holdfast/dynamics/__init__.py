"""Dynamics: how far a model is from refusing at each step of an answer."""
