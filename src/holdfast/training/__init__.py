"""Fine-tuning on TRL's SFTTrainer: targets, mixtures, defenses, checkpoints."""
