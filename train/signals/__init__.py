"""What makes a patch heavy: sources of scores behind one protocol (`famt.train.signals.signal`);
`config` lists them by slot."""
