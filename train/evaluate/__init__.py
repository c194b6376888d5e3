"""Evaluations of an encoder.

`features` turns labelled shards into features, each image once. An evaluator, a module in
`evaluators`, has options and metrics, and names the function that takes an encoder, training images
and test images and yields (name, value) pairs. `run` loads the encoder, calls that function, and
reports to the terminal, the run's log and TensorBoard.
"""
