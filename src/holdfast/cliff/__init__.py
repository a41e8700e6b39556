"""The cliff: a probe for refusal, its score along the thinking, and the verdict."""
