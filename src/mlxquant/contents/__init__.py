"""What is in a file or folder, without loading it: arrays, quantized layers, where it came from, and whether it is
whole.
"""
