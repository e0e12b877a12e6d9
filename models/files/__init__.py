"""How files are read and written: whole or not at all, sealed, bounded, and inside their folder."""
