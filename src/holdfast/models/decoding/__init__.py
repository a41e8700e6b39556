"""Decoding left to right, and the state of each row while it lasts."""
