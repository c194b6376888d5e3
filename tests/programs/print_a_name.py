"""Print a name that ASCII lacks."""

from famt.train.program import run_program

run_program(print, "ä")
