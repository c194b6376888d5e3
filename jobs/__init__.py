"""Programs: parse options, run functions of the other packages, on Ray if useful, and report."""
