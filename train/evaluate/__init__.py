"""Evaluations of an encoder.

`features` turns labelled shards into features, each image once. An evaluator takes an encoder,
training images, test images and its options, and yields (name, value) pairs. `run` loads the
encoder, calls the evaluator, and reports to the terminal, the run's log and TensorBoard.
"""
