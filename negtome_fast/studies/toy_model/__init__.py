"""Training of the embedded model and of its overfitted variant, and the model's card."""
