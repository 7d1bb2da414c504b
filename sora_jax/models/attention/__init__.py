"""Attention within segments: one interface, one implementation per backend."""
