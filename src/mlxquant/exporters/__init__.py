"""Other programs' formats, and archives."""
