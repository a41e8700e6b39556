"""Checkpoints to models whose parts are found and proved."""
