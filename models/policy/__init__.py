"""Weights and what they say: loading, log-probs, answers; and a base looked at before it is trained."""
