"""Training checkpoints, and bundles: a model in one folder."""
