"""Rollouts: questions from prompts, answers drawn, judged and kept as rows."""
