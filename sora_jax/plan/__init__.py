"""What a run would take on machines that aren't here: compiled by their own compiler, counted, priced."""
