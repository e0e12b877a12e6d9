"""When: Prefect flows and the command line. No torch, trl or mlflow."""
