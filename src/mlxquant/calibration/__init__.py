"""What the model saw: trajectories of pictures, windows of text, recorded calls."""
