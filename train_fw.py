"""Train a velocity field by Flow Walking (Eq. 8, Alg. 2) to stand in for a span of a teacher's layers.

    python train_fw.py --start 6 --end 18              # one flow for layers 6..17, twelve of them
    python train_fw.py --resume runs/fw-6-18           # go on with a run that was stopped, as if it had not been

Flow matching looks at points on the straight path from x0 to x1. Where such paths cross it learns the mean of their
velocities, and which x0 belongs to which x1 is lost. Flow Walking asks only that a walk from x0, each step starting where
the last one landed, ends at the right x1. The training loop is that of train_fm.py.
"""
import functools

import torch

from eval_kl import kl_divergence, log_probabilities
from lft import SOLVERS, integrate, run_script
from train_fm import flow_matching_loss, make_parser, mean_square, one_or_more, parse_arguments, train, zero_or_more


def flow_walking_loss(velocity, x0, x1, logits=None, k=3, solver="midpoint", alpha=0.0, logit_weight=0.0, token_power=0.0):
    """Flow Walking (Eq. 8, Alg. 2): E‖x̂1 − x1‖², where x̂1 is x0 walked in k steps through times 0 < t1 < … < 1.

    velocity: a function of (x, t). x0, x1: (batch, seq, hidden). The gradient goes through all steps; the times are sorted
    uniforms. Returns a number, by `mean_square`. alpha: above 0 it is the hybrid (Eq. 9), L_FW + α·L_FM. logit_weight: that
    many times KL(logits(x1) || logits(x̂1)), in nats per token, is added, which is ours.
    """
    inner = torch.rand(k - 1, len(x0), 1, 1, device=x0.device).sort(dim=0).values  # each sequence has its own
    x1_hat = integrate(velocity, x0, [0.0, *inner, 1.0], solver)
    loss = mean_square(x1_hat - x1, x1, token_power)  # Eq. 8
    if alpha:
        loss = loss + alpha * flow_matching_loss(velocity, x0, x1, token_power=token_power)  # Eq. 9
    if logit_weight:
        with torch.no_grad():
            log_p = log_probabilities(logits(x1))
        loss = loss + logit_weight * kl_divergence(log_p, log_probabilities(logits(x1_hat))).mean()
    return loss


def main():
    parser = make_parser(__doc__.splitlines()[0], "fw", 6, 18)
    parser.set_defaults(init="middle")  # a better start than the first layer, in trials (studies/README.md)
    add = parser.add_argument
    add("--k", type=one_or_more, default=3, help="steps of the walk (default %(default)s)")
    add("--solver", choices=SOLVERS, default="midpoint", help="of each step (default %(default)s)")
    add("--alpha", type=zero_or_more, default=0.0, help="weight of the flow-matching loss in the hybrid, Eq. 9 (default %(default)s)")
    add("--logit-weight", type=zero_or_more, default=0.0, help="weight of the logits' KL in the loss, ours; runs the layers after the span too (default %(default)s)")
    args, checkpoint = parse_arguments(parser, "fw")
    own = {"k": args.k, "solver": args.solver, "alpha": args.alpha, "logit_weight": args.logit_weight, "token_power": args.token_power}
    train(args, checkpoint, "fw", functools.partial(flow_walking_loss, **own), args.solver, args.k)


if __name__ == "__main__":
    run_script(main)
