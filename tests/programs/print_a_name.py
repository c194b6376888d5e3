"""Print a name that ASCII lacks."""

from famt.train.command_line import run_program

run_program(print, "ä")
