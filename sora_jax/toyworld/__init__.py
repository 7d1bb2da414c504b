"""A synthetic world whose every attribute is known: scenes, captions, renderer, oracle."""
