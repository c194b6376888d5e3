"""Programs: parse options, run functions of the other rooms, on Ray where it helps, and report."""
