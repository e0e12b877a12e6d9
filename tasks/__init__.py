"""How it is run and remembered: Prefect tasks, the store of results, MLflow."""
