"""What makes a patch heavy: a file a source, behind one protocol (`famt.train.signals.signal`)."""
