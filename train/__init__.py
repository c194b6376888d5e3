"""The training programs: pre-training, the linear probe, figures."""
