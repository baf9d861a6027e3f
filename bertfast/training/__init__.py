"""Pre-training, fine-tuning, evaluation and prediction."""
