"""Train a flow for Gemma 2 or 3, by Flow Walking or flow matching.

One channel holds most of the squared state of every token, 0.8 to 0.94 of it in most layers of Gemma-3-270M. A plain
squared error sees little else, so here the loss is that of states divided by the size of each channel.
"""

import functools

from gemma3 import Gemma3Student

from lft import SOLVERS
from loop import at_least_1, make_parser, train
from run import run_script
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss


def divided_velocity(x, t, velocity, size):
    return velocity(x * size, t) / size


def loss_of_divided_states(velocity, x0, x1, batch, loss_of, power):
    size = x1.abs().mean(dim=(0, 1)) ** power  # (hidden,)
    divided = functools.partial(divided_velocity, velocity=velocity, size=size)
    return loss_of(divided, x0 / size, x1 / size)


def main():
    parser = make_parser(__doc__, "fw", start=6, end=12)
    add = parser.add_argument
    add("--method", choices=("fm", "fw"), help="flow matching or Flow Walking (default: fw)")
    add("--k", type=at_least_1, default=3, help="steps of the walk (default: %(default)s)")
    add("--solver", choices=SOLVERS, default="midpoint", help="solver of each step (default: %(default)s)")
    add("--channel-power", type=float, default=1.0, help="divide by size^power; 0 is the plain loss (default: 1)")
    args = parser.parse_args()
    loss_of = flow_matching_loss
    if args.method == "fw":
        loss_of = functools.partial(flow_walking_loss, k=args.k, solver=args.solver)
    loss = functools.partial(loss_of_divided_states, loss_of=loss_of, power=args.channel_power)
    train(args, loss, args.solver, args.k, student_class=Gemma3Student)


if __name__ == "__main__":
    run_script(main)
