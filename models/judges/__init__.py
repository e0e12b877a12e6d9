"""Who scores an answer, and what they said already."""
