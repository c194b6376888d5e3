"""The benchmarks behind `famt benchmark`, a file each; `measure` is what they have in common."""
