"""Values to text and JSON; data goes to stdout, progress to stderr."""
