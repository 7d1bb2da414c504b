"""Transformer, autoencoder, text encoder."""
