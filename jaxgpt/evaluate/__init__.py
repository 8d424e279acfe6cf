"""What the finished models can do: exact answers, gold scores, win rates, the reward model's accuracy, samples."""
