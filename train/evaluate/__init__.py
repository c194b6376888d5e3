"""What a pre-trained encoder is worth: evaluators on one trunk.

`trunk` turns labelled shards into features, each image once. An evaluator takes an encoder, the
images to learn from, those to test on and its options, and yields (name, value) pairs. `run` finds
the encoder, calls the evaluator, and tells what came out: on the terminal, in the run's log and in
TensorBoard.
"""
