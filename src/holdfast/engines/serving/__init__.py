"""Servers: how they are spoken to, what they send, and the rows that it makes."""
