"""Train a flow for Gemma 2 or 3 that starts at the least-squares map of x0, by Flow Walking."""

import functools

from gemma3_linear_start import Gemma3LinearStart
from train_gemma3 import loss_of_divided_states
from train_linear_start import loss_from_map, with_map

from loop import make_parser, train
from run import run_script
from train_fw import flow_walking_loss


def main():
    args = make_parser(__doc__, "linear-start", start=6, end=12).parse_args()
    divided = functools.partial(loss_of_divided_states, loss_of=flow_walking_loss, power=1.0)
    loss = functools.partial(loss_from_map, loss_of=divided)
    student_class = with_map(Gemma3LinearStart, args)
    train(args, loss, solver="midpoint", k=3, student_class=student_class)


if __name__ == "__main__":
    run_script(main)
