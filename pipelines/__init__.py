"""Photos to Parquet tables, on Ray; independent of training."""
