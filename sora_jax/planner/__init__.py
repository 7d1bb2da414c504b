"""What a configuration needs on chips that are not here."""
