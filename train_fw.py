"""Train a velocity field by Flow Walking (Eq. 8, Alg. 2) to replace a span of a teacher's layers.

    python train_fw.py --start 6 --end 18               # layers 6..17
    python train_fw.py --start 6 --end 18 --resume      # continue where that run stopped

Flow matching trains at points on the straight paths from x0 to x1. Where two paths cross it learns the mean of their
velocities, and forgets which x0 belongs to which x1. Flow Walking takes real solver steps from x0, each starting where
the last one landed, and only asks that the walk ends at its own x1.
"""

import functools

import torch

from lft import SOLVERS, TOKEN_POWER, equal_times, integrate, kl_divergence, token_weights
from loop import at_least_1, make_parser, train
from run import run_script
from train_fm import flow_matching_loss


def flow_walking_loss(
    velocity,
    x0,
    x1,
    batch=None,
    k=3,
    solver="midpoint",
    times="random",
    alpha=0.0,
    logit_weight=0.0,
    token_power=TOKEN_POWER,
):
    """E w ‖x̂1 - x1‖²: walk x0 in k steps through times 0 < … < 1; the end, x̂1, should be its own x1 (Eq. 8).

    velocity, x0, x1, w and ‖·‖²: as in `flow_matching_loss`. Gradients flow through all steps. alpha adds α·L_FM, the
    hybrid (Eq. 9; not the α of the velocity block). Ours: times "equal" takes equal steps; logit_weight adds that many
    times KL(logits(x1) || logits(x̂1)), in nats per token.
    """
    if times == "equal":
        path = equal_times(k)
    else:
        inner = torch.rand(k - 1, len(x0), 1, 1, device=x0.device).sort(dim=0).values  # one set per sequence
        path = [0.0, *inner, 1.0]
    x1_hat = integrate(velocity, x0, path, solver)
    error = (x1_hat - x1).square().mean(dim=-1)  # ‖x̂1 - x1‖² (Eq. 8)
    loss = (token_weights(x1, token_power) * error).mean()
    if alpha:
        loss = loss + alpha * flow_matching_loss(velocity, x0, x1, token_power=token_power)  # L_FW + α·L_FM (Eq. 9)
    if logit_weight:
        with torch.no_grad():
            log_p = batch.logits(x1).float().log_softmax(dim=-1)
        log_q = batch.logits(x1_hat).float().log_softmax(dim=-1)
        loss = loss + logit_weight * kl_divergence(log_p, log_q).mean()
    return loss


def main():
    parser = make_parser(__doc__, "fw", start=6, end=18)
    add = parser.add_argument
    add("--k", type=at_least_1, default=3, help="steps of the walk (default: %(default)s)")
    add("--solver", choices=SOLVERS, default="midpoint", help="solver of each step (default: %(default)s)")
    add("--times", choices=("random", "equal"), default="random", help="of the steps (default: random, the paper's)")
    add("--alpha", type=float, default=0.0, help="weight of the flow-matching loss (Eq. 9; default: %(default)s)")
    add("--logit-weight", type=float, default=0.0, help="weight of the logits' KL (default: %(default)s)")
    add("--token-power", type=float, default=TOKEN_POWER, help="weigh tokens by 1 / RMS(x1)^power (default: 1)")
    args = parser.parse_args()
    loss = functools.partial(
        flow_walking_loss,
        k=args.k,
        solver=args.solver,
        times=args.times,
        alpha=args.alpha,
        logit_weight=args.logit_weight,
        token_power=args.token_power,
    )
    train(args, loss, args.solver, args.k)  # the student walks as it was trained


if __name__ == "__main__":
    run_script(main)
