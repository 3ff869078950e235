"""Files that arrive whole or not at all, and what is said where they cannot."""
