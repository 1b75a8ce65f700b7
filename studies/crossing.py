"""Why walk? Both losses of the training scripts on points in a plane whose straight paths cross.

    python studies/crossing.py        # half a minute on one core; writes pictures/crossing.png

Every x1 is -x0, so all straight paths meet in the middle at t = 1/2, where flow matching can only learn their mean velocity.
Flow Walking is free to bend the paths; which way depends on the seed. A curve shows where a walk stands if it is stopped early.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from matplotlib import pyplot
from torch import nn

from lft import integrate, run_script
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss


class Velocity(nn.Sequential):
    def forward(self, x, t):  # x: (batch, 1, 2); t: a number or (batch, 1, 1)
        return super().forward(torch.cat([x, torch.zeros_like(x[..., :1]) + t], dim=-1))


def starts(n):
    """n points x0, (n, 1, 2), in turn from a cluster at the upper left and from one at the lower left."""
    side = torch.tensor([1.0, -1.0]).repeat(n)[:n]
    return (torch.stack([-torch.ones(n), side], dim=-1) + torch.tensor([0.1, 0.2]) * torch.randn(n, 2))[:, None]


def trained(loss_of, steps=2000):
    torch.manual_seed(3)
    u = Velocity(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(u.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        x0 = starts(128)
        loss_of(u, x0, -x0, token_power=0.0).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return u


@torch.no_grad()
def walk(u, x0, k, stops=1):
    """Where walks of k midpoint steps stand when they are stopped at stops + 1 times from 0 to 1: (stops + 1, n, 2)."""
    s = torch.linspace(0, 1, stops + 1).repeat_interleave(len(x0))[:, None, None]
    return integrate(u, x0.repeat(stops + 1, 1, 1), [s.clamp(max=i / k) for i in range(k + 1)]).view(stops + 1, -1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="pictures/crossing.png", help="PNG file to write")
    args = parser.parse_args()
    matching, walking = trained(flow_matching_loss), trained(flow_walking_loss)
    x0, (figure, panels) = starts(200), pyplot.subplots(1, 3, figsize=(11, 4))
    for axes, title, path, text in (
        (panels[0], "the pairs:\nstraight paths cross", torch.cat([x0, -x0], dim=1).transpose(0, 1), "distance {distance:.2f}"),
        (panels[1], "flow matching:\npaths that cross are averaged", walk(matching, x0, 100, 100), "100 steps, mean error {error:.2f}"),
        (panels[2], "Flow Walking:\npaths bend and arrive", walk(walking, x0, 3, 99), "3 steps, mean error {error:.2f}"),
    ):
        text = text.format(distance=2 * x0.norm(dim=-1).mean(), error=(path[-1] + x0[:, 0]).norm(dim=-1).mean())
        print(title.replace("\n", " "), text, sep="; ")
        for side, color in (1, "#0072B2"), (-1, "#D55E00"):  # blue and orange, which color-blind readers tell apart
            x, y = path[:, (1 - side) // 2 : 60 : 2].unbind(dim=-1)
            axes.add_patch(pyplot.Circle((1, -side), 0.55, color=color, alpha=0.13, lw=0))  # where this color should arrive
            axes.plot(x, y, color=color, lw=0.9, alpha=0.5)
            axes.scatter(x[0], y[0], s=14, facecolor="white", edgecolor=color, zorder=3)
            axes.scatter(x[-1], y[-1], s=14, color=color, zorder=3)
            panels[0].text(-1.5, side, "$x_0$", color=color, fontsize=17, ha="center", va="center")
            panels[0].text(1.75, -side, "$x_1$", color=color, fontsize=17, ha="center", va="center")
        axes.text(0, -1.95, text, fontsize=14, ha="center")
        axes.set_title(title, fontsize=15)
        axes.set(aspect="equal", xlim=(-2, 2), ylim=(-2, 1.7))
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(args.out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run_script(main)
