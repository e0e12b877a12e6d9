"""What the tables say: bounds, rates, margins, distances, ratings."""
