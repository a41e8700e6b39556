"""Attention sinks: how far attention to the first token diverges."""
