"""What is measured of a model: accuracy, cost, latency, and the host it is measured on; knows nothing of MLflow."""
