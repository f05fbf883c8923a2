"""What an optimiser step is made of: forward and backward, and what moves the weights."""
