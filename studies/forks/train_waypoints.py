"""Train by Flow Walking in equal steps, each of which also aims at the teacher's state at its depth of the span."""

import functools

import torch

from lft import equal_times, midpoint, token_weights
from loop import make_parser, train
from run import load_teacher, run_script

K = 3


@torch.no_grad()
def states_between(layers, x, context):
    """The teacher's states at K equal depths of the span, the last of them x1."""
    states = []
    for number, layer in enumerate(layers, 1):
        x = layer(x, **context)
        if number in [len(layers) * i // K for i in range(1, K + 1)]:
            states.append(x)
    return states


def waypoint_loss(velocity, x0, x1, batch, layers, max_steps):
    """The errors of all K landings; the weight of those before x1 falls to zero over the run."""
    loss = 0
    fading = 1 - batch.step / max_steps
    times = equal_times(K)
    for i, target in enumerate(states_between(layers, x0, batch.context)):
        x0 = midpoint(velocity, x0, times[i], times[i + 1])
        error = (x0 - target).square().mean(dim=-1)
        weight = 1 if i == K - 1 else fading
        loss = loss + weight * (error * token_weights(target)).mean()
    return loss


def main():
    args = make_parser(__doc__, "waypoints", start=12, end=24).parse_args()
    teacher, _ = load_teacher(args.teacher or "tiny_teacher", args.device)
    layers = teacher.get_decoder().layers[args.start : args.end]
    train(args, functools.partial(waypoint_loss, layers=layers, max_steps=args.max_steps), solver="midpoint", k=K)


if __name__ == "__main__":
    run_script(main)
