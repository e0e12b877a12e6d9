"""What is true: the method, its data and its evidence, in plain Python. Never Prefect or MLflow."""
