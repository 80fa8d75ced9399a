"""The HTML page, and the pictures that commands write."""
