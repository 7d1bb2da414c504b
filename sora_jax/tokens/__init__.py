"""From latents to packed sequences of tokens, and back."""
