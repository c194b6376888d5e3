"""The benchmarks of `famt benchmark`, a file each; `measure` holds what they share."""
