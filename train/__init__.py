"""Training: pre-training and its signals, evaluations, export, reports."""
