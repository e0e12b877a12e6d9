"""Which candidate holds the constraint, and may it serve."""
