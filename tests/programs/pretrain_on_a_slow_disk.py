"""`famt.train.pretrain` where a file takes two seconds to reach the disk."""

import os
import sys
import time

from famt.train.command_line import parse, run_program
from famt.train.pretrain import main

fsync = os.fsync


def slowly(fd: int) -> None:
    time.sleep(2)
    fsync(fd)


os.fsync = slowly
run_program(main, parse(sys.argv[1:], __doc__))
