"""All of MLflow: store, runs, metrics, registry, lineage, and the verification of registered versions."""
