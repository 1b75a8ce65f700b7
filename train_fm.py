"""Train a velocity field by flow matching (Eq. 3, Alg. 1) to replace a span of a teacher's layers.

python train_fm.py --start 6 --end 12               # layers 6..11
python train_fm.py --start 6 --end 12 --resume      # continue where that run stopped
torchrun --nproc_per_node 4 -- train_fm.py --start 6 --end 12
"""

import functools

import torch

from lft import TOKEN_POWER, token_weights
from loop import make_parser, train
from run import run_script


def flow_matching_loss(velocity, x0, x1, batch=None, token_power=TOKEN_POWER):
    """E w ‖u(x_t, t) - (x1 - x0)‖², x_t = (1 - t) x0 + t x1: on the straight path, predict its velocity (Eq. 3).

    w = 1 / RMS(x1)^token_power, one for each token, is ours; the paper has w = 1. ‖·‖² is divided by the number of
    channels. velocity: a function of (x, t). x0, x1: (batch, seq, hidden). batch: for losses that need more (see
    loop.train). Returns a scalar.
    """
    t = torch.rand(len(x0), 1, 1, device=x0.device)  # one time per sequence
    x_t = (1 - t) * x0 + t * x1
    error = (velocity(x_t, t) - (x1 - x0)).square().mean(dim=-1)  # ‖u(x_t, t) - (x1 - x0)‖² (Eq. 3)
    return (token_weights(x1, token_power) * error).mean()


def main():
    parser = make_parser(__doc__, "fm", start=6, end=12)
    parser.add_argument("--token-power", type=float, default=TOKEN_POWER, help="weigh tokens by 1 / RMS(x1)^power")
    args = parser.parse_args()
    loss = functools.partial(flow_matching_loss, token_power=args.token_power)
    train(args, loss, solver="midpoint", k=1)  # the student takes one midpoint step: more steps hardly lower its KL


if __name__ == "__main__":
    run_script(main)
