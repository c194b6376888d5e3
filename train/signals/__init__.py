"""What makes a patch heavy: a file a source, all behind one protocol (`train.signals.signal`)."""
