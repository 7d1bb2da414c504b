"""Frozen networks whose features metrics are made of."""
