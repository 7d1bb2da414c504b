"""What a configuration would cost on devices that aren't at hand."""
