"""What models come in: GGUF, packed weights, several devices, and proofs that stay."""
