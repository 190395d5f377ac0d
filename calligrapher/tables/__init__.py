"""The Parquet tables of a round."""
