"""Train a velocity field by Flow Walking (Eq. 8, Alg. 2) to stand in for a span of a teacher's layers.

    python train_fw.py --start 6 --end 18              # one flow for layers 6..17, twelve of them
    python train_fw.py --resume runs/fw-6-18           # go on with a run that was stopped, as if it had not been

Flow matching looks at points on the straight path from x0 to x1. Where such paths cross it learns the mean of their
velocities, and which x0 belongs to which x1 is lost. Flow Walking asks only that a walk from x0, each step starting where
the last one landed, ends at the right x1. The training loop is that of train_fm.py.
"""
import functools
import math

import torch
import torch.nn.functional as F

from lft import SOLVERS, InputError, check_positive, integrate, run_script
from train_fm import flow_matching_loss, parse_arguments, read_arguments, train


def flow_walking_loss(velocity, x0, x1, steps=3, solver="midpoint", alpha=0.0, logit_weight=0.0, logit_kl=None, by_quarter=None):
    """Flow Walking (Eq. 8, Alg. 2): walk from x0 through random times to t = 1, and compare with x1.

    velocity: a function of (x, t). x0, x1: (batch, seq, hidden). The gradient goes through all `steps` steps. Returns the mean
    square over all elements. With alpha above 0 it is the hybrid (Eq. 9), L_FW + alpha L_FM; by_quarter: as in flow matching,
    for the hybrid's share of it. With logit_weight above 0, which is ours, it adds that many times `logit_kl(x1, x1_hat)`, the
    KL of the logits in nats per token.
    """
    inner = torch.rand(steps - 1, len(x0), 1, 1, device=x0.device).sort(dim=0).values  # each sequence has its own
    x1_hat = integrate(velocity, x0, [0.0, *inner, 1.0], solver)
    loss = F.mse_loss(x1_hat, x1)  # Eq. 8
    if alpha:
        loss = loss + alpha * flow_matching_loss(velocity, x0, x1, by_quarter=by_quarter)  # Eq. 9
    if logit_weight:
        loss = loss + logit_weight * logit_kl(x1, x1_hat)
    return loss


def main():
    parser = parse_arguments(__doc__.splitlines()[0], "fw", 6, 18)
    add = parser.add_argument
    add("--steps", type=int, default=3, help="steps of the walk, k (default %(default)s)")
    add("--solver", choices=SOLVERS, default="midpoint", help="of each step (default %(default)s)")
    add("--alpha", type=float, default=0.0, help="weight of the flow-matching loss in the hybrid, Eq. 9 (default %(default)s)")
    add("--logit-weight", type=float, default=0.0, help="weight of the logits' KL in the loss, ours; runs the layers after the span too (default %(default)s)")
    args, saved = read_arguments(parser, "fw")
    check_positive(args, "steps")
    weights = {"alpha": args.alpha, "logit_weight": args.logit_weight}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {weight} is no weight: give 0 or more")
    walk = {"steps": args.steps, "solver": args.solver}
    loss_of = functools.partial(flow_walking_loss, **walk, **weights)
    train(args, saved, "fw", loss_of, **walk, notes=weights, wants_logits=args.logit_weight > 0)


if __name__ == "__main__":
    run_script(main)
