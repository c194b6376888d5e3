"""`famt.train.pretrain` whose epochs last a second until a job has made maps that it takes up."""

import sys
import time

from famt.train import pretrain
from famt.train.command_line import parse, run_program
from famt.train.stop import Stop


class Leisurely(pretrain.Run):
    def end_epoch(self, epoch: int, stop: Stop) -> bool:
        if self.context.refreshed.current is None:
            time.sleep(1)
        return super().end_epoch(epoch, stop)


pretrain.Run = Leisurely
run_program(pretrain.main, parse(sys.argv[1:], __doc__))
