"""From data sets to packed batches."""
