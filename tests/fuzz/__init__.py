"""Files and texts that somebody has changed: whatever is read loads, or gives one line."""
