"""transformers models, tamed: loading, proofs, hidden states and decoding."""
