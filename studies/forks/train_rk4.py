"""Train by Flow Walking with one Runge-Kutta step."""

import functools

from rk4 import RK4ForCausalLM

from loop import make_parser, train
from run import run_script
from train_fw import flow_walking_loss


def main():
    args = make_parser(__doc__, "rk4", start=6, end=18).parse_args()
    loss = functools.partial(flow_walking_loss, k=1, solver="rk4")
    train(args, loss, solver="rk4", k=1, student_class=RK4ForCausalLM)


if __name__ == "__main__":
    run_script(main)
