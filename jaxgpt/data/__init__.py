"""From the user's files to batches: NumPy arrays out, and no jax in here."""
