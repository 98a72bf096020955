"""Training: losses, ranking data, the trainer."""
