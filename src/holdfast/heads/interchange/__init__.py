"""Heads of one run put into another run of the same request, which ended otherwise."""
