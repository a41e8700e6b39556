"""Fine-tuning on TRL's SFTTrainer: rows, targets, defenses, checkpoints."""
