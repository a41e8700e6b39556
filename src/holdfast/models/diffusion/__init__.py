"""Masked diffusion: unmasking step by step, and replaying the steps."""
