"""What a user submits: thin scripts that parse, run a room's functions on Ray, and report."""
