"""Train a velocity field by Flow Walking (Eq. 8, Alg. 2) to replace a span of a teacher's layers.

    python train_fw.py --start 6 --end 18               # layers 6..17
    python train_fw.py --start 6 --end 18 --resume      # continue where that run stopped

Flow matching trains at points on the straight paths from x0 to x1. Where two paths cross it learns the mean of their velocities,
and forgets which x0 belongs to which x1. Flow Walking takes real solver steps from x0, each starting where the last one landed,
and only asks that the walk ends at its own x1. The training loop is that of train_fm.py.
"""
import functools

import torch

from eval_kl import TOKEN_POWER, kl_divergence, token_errors
from lft import SOLVERS, integrate, run_script
from train_fm import flow_matching_loss, make_parser, train


def flow_walking_loss(
    velocity, x0, x1, logits=None, k=3, solver="midpoint", alpha=0.0, times="random", logit_weight=0.0, token_power=TOKEN_POWER
):  # fmt: skip
    """E‖x̂1 - x1‖² (Eq. 8), where x̂1 is x0 walked in k steps through random times 0 < t1 < … < 1, with gradients through all.

    velocity, x0, x1: as in `flow_matching_loss`. alpha adds α·L_FM, the hybrid (Eq. 9). Our additions: times "equal" takes equal
    steps, as the student will; logit_weight adds that many times KL(logits(x1) || logits(x̂1)) in nats per token.
    """
    inner = torch.rand(k - 1, len(x0), 1, 1, device=x0.device).sort(dim=0).values  # one set per sequence
    if times == "equal":
        inner = [i / k for i in range(1, k)]
    x1_hat = integrate(velocity, x0, [0.0, *inner, 1.0], solver)
    loss = token_errors(x1_hat - x1, x1, token_power).mean()  # Eq. 8
    if alpha:
        loss = loss + alpha * flow_matching_loss(velocity, x0, x1, token_power=token_power)  # Eq. 9
    if logit_weight:
        with torch.no_grad():
            log_p = logits(x1).float().log_softmax(dim=-1)
        loss = loss + logit_weight * kl_divergence(log_p, logits(x1_hat).float().log_softmax(dim=-1)).mean()
    return loss


def main():
    parser = make_parser(__doc__, "fw", start=6, end=18, init="middle")
    add = parser.add_argument
    add("--k", type=int, default=3, help="steps of the walk (default: %(default)s)")
    add("--solver", choices=SOLVERS, default="midpoint", help="solver of each step (default: %(default)s)")
    add("--times", choices=("random", "equal"), default="random", help="of the walk's steps (default: random, as in the paper)")
    add("--alpha", type=float, default=0.0, help="weight of the flow-matching loss (Eq. 9; default: %(default)s)")
    add("--logit-weight", type=float, default=0.0, help="weight of the logits' KL (default: %(default)s)")
    add("--token-power", type=float, default=TOKEN_POWER, help="divide a token's error by RMS(x1) to this power (default: 1)")
    args = parser.parse_args()
    own = {name: getattr(args, name) for name in ("k", "solver", "times", "alpha", "logit_weight", "token_power")}
    train(args, functools.partial(flow_walking_loss, **own), args.solver, args.k)


if __name__ == "__main__":
    run_script(main)
