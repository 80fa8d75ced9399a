"""Numbers about pictures and text."""
