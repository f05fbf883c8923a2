"""Training on images and sounds: their samples, their configuration, their loss and their score."""
