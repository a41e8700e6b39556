"""Engines: whoever draws completions, in this process or behind a server."""
