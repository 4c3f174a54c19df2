"""Sources: every kind of checkpoint that can be opened."""
