"""Train a velocity that never sees t by Flow Walking in equal steps: does the time help?"""

import functools

from timeless import TimelessForCausalLM

from loop import make_parser, train
from run import run_script
from train_fw import flow_walking_loss


def main():
    args = make_parser(__doc__, "timeless", start=12, end=24).parse_args()
    loss = functools.partial(flow_walking_loss, times="equal")
    train(args, loss, solver="midpoint", k=3, student_class=TimelessForCausalLM)


if __name__ == "__main__":
    run_script(main)
