"""Photos in, Parquet tables out, on Ray; knows no training."""
