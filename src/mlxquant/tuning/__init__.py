"""What is trained once codes are frozen: scales, offsets, biases and steps, end to end, on what the model predicts."""
