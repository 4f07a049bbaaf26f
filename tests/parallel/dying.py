"""`common.parallel.distil`, whose process 1 is killed when step 6 begins, as a full memory would do it."""

import os
import signal

from common.parallel import distil

_one_step = distil.one_step


def one_step(model, teacher, windows, step, plan, device):
    if step == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return _one_step(model, teacher, windows, step, plan, device)


distil.one_step = one_step

if __name__ == "__main__":
    distil.main()
