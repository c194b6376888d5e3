"""Evaluations of an encoder.

`features` turns labelled shards into features, each image once. An evaluator, a module in
`evaluators`, has options and metrics, takes an encoder, training images and test images, and yields
(name, value) pairs. `run` loads the encoder, calls the evaluator, and reports to the terminal, the
run's log and TensorBoard.
"""
