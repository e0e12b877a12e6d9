"""Who serves, and what was decided."""
