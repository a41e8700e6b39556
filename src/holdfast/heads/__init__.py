"""Attention heads: ranked by what they write along the probe, then ablated."""
