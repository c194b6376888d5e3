"""The benchmarks behind `jobs.benchmark`, a file each; `measure` is what they have in common."""
