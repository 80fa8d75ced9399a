"""What ships with the package: two small models, and prompts."""
