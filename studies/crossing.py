"""Why walk? Both losses of the training scripts on points in a plane whose straight paths cross.

    python studies/crossing.py        # half a minute on one core; draws pictures/crossing.png

Every x1 is -x0, so all straight paths meet in the middle at t = 1/2, where flow matching can only learn their mean
velocity. Flow Walking is free to bend the paths; which way depends on the seed. Curves show where walks stand if they
are stopped early: 100 midpoint steps after flow matching, 3 after Flow Walking, as in its training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

from lft import equal_times, integrate
from studies.results import pyplot
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss


def starts(n):
    """2n points x0, (2n, 1, 2), alternating between a cluster at the upper left and one at the lower left."""
    centers = torch.tensor([[[-1.0, 1.0]], [[-1.0, -1.0]]]).repeat(n, 1, 1)
    return centers + torch.tensor([0.1, 0.2]) * torch.randn(2 * n, 1, 2)


class Field(nn.Module):
    """u(x, t) in the plane, a small network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x, t):
        times = torch.zeros_like(x[..., :1]) + t
        return self.net(torch.cat([x, times], dim=-1))


def trained(loss_of, steps=2000):
    """A field trained by a loss of the training scripts."""
    torch.manual_seed(0)
    u = Field()
    optimizer = torch.optim.Adam(u.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        x0 = starts(64)
        loss_of(u, x0, -x0, token_power=0.0).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return u


@torch.no_grad()
def walk(u, x0, k, stops=1):
    """Where walks of k midpoint steps stand if stopped at stops + 1 times from 0 to 1: (stops + 1, n, 2)."""
    last = torch.linspace(0, 1, stops + 1).repeat_interleave(len(x0))[:, None, None]
    times = [last.clamp(max=t) for t in equal_times(k)]
    return integrate(u, x0.repeat(stops + 1, 1, 1), times).view(stops + 1, -1, 2)


def main():
    fm = trained(flow_matching_loss)
    fw = trained(flow_walking_loss)
    x0 = starts(100)
    panels = {
        "the pairs:\nstraight paths cross": torch.cat([x0, -x0], dim=1).transpose(0, 1),
        "flow matching:\npaths that cross are averaged": walk(fm, x0, 100, 100),
        "Flow Walking:\npaths bend and arrive": walk(fw, x0, 3, 99),
    }
    options = {"aspect": "equal", "xlim": (-2, 2), "ylim": (-1.8, 1.8), "xticks": [], "yticks": [], "frame_on": False}
    figure, grid = pyplot.subplots(1, 3, figsize=(11, 4), layout="tight", subplot_kw=options)
    for axes, (title, path) in zip(grid, panels.items()):
        error = (path[-1] + x0[:, 0]).norm(dim=-1).mean()
        axes.set_title(f"{title}\n(mean error {error:.2f})", fontsize=15)
        print(axes.get_title())
        for side, color in ((1, "#0072B2"), (-1, "#D55E00")):  # blue and orange, which color-blind readers tell apart
            x, y = path[:, (1 - side) // 2 : 60 : 2].unbind(dim=-1)
            target = pyplot.Circle((1, -side), 0.55, color=color, alpha=0.13, lw=0)  # where this color should arrive
            axes.add_patch(target)
            axes.plot(x, y, color=color, lw=0.9, alpha=0.5)
            axes.scatter(x[0], y[0], s=14, facecolor="white", edgecolor=color, zorder=3)
            axes.scatter(x[-1], y[-1], s=14, color=color, zorder=3)
    figure.savefig("pictures/crossing.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
