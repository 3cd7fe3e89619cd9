"""Series for other tools: Prometheus, TensorBoard, CSV and Parquet."""
