"""What is remembered of a run: MLflow, and the ledger that vouches for it. The only room that imports mlflow."""
