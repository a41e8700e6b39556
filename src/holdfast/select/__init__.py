"""Selection of fine-tuning rows by their score along the probe."""
