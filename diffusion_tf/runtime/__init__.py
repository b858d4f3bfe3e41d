"""Where programs run: strategies, replicas, workers, microbatches."""
