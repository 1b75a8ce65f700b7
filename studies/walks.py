"""What else could make Flow Walking better? Three variants, trained by the loop of train_fm.py.

    python studies/walks.py timeless --teacher smollm2 --data stdlib --start 12 --end 24 --max-steps 1000

    timeless   the velocity never sees t: the time network stays at zero
    waypoints  each landing is also compared with the teacher's state at that depth; this term fades out
    linear     the flow starts from the least-squares map, W x0 + b, with its gates at zero

All walk in equal steps (train_fw.py --times equal). The linear map cannot be saved: of that run only the log is left.
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_fm
from data import take, training_rows
from eval_kl import fit_linear, token_errors
from lft import FlowLayer, hidden_pair, midpoint, run_script, trunk_of
from train_fw import flow_walking_loss

K = 3
make_student = train_fm.make_student


def waypoint_loss(velocity, x0, x1, logits, states, weights):
    """Midpoint steps that all aim at the teacher's states, those before x1 with a falling weight."""
    targets, weight, loss = [*states, x1], next(weights), 0
    states.clear()
    for i, target in enumerate(targets):
        x0 = midpoint(velocity, x0, i / K, (i + 1) / K)
        loss = loss + (1 if i == K - 1 else weight) * token_errors(x0 - target, target).mean()
    return loss


def waypoint_trunk(teacher, end, states, start):
    """The teacher's first layers, which append the states at K - 1 equal depths of the span to `states` when they are called."""
    trunk = trunk_of(teacher, end)
    for i in range(1, K):
        trunk.layers[start + (end - start) * i // K].register_forward_pre_hook(lambda _, x: states.append(x[0]))
    return trunk


def timeless_student(*args):
    teacher, tokenizer, student = make_student(*args)
    student.flow.velocity.time_mlp.requires_grad_(False)  # its last layer starts at zero
    return teacher, tokenizer, student


def linear_student(args, *rest):
    """A student whose flow starts from the least-squares map, in training and in use."""
    teacher, tokenizer, student = make_student(args, *rest)
    rows = take(training_rows(args.data, tokenizer, args.seq_len), 32_768 // args.seq_len)
    linear = fit_linear(teacher, rows, args.start, args.end)
    student.flow.velocity.time_mlp[-1].bias.data.view(6, -1)[[2, 5]] = -1.0  # α = 1 + gate = 0
    student.flow.walk = lambda velocity, x: FlowLayer.walk(student.flow, velocity, linear(x))
    train_fm.hidden_pair = lambda *pair: (linear((found := hidden_pair(*pair))[0]), *found[1:])
    return teacher, tokenizer, student


def main():
    variant = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    parser = train_fm.make_parser(__doc__, variant, start=12, end=24, init="middle")
    args, loss_of = parser.parse_args(), functools.partial(flow_walking_loss, k=K, times="equal")
    if variant == "timeless":
        train_fm.make_student = timeless_student
    elif variant == "waypoints":
        states, calls = [], args.max_steps * args.accumulate
        train_fm.trunk_of = functools.partial(waypoint_trunk, states=states, start=args.start)
        loss_of = functools.partial(waypoint_loss, states=states, weights=iter(torch.linspace(1, 0, calls).tolist()))
    elif variant == "linear":
        train_fm.make_student = linear_student
    else:
        parser.error("the first argument is timeless, waypoints or linear")
    train_fm.train(args, loss_of, "midpoint", K)
    if variant == "linear":
        (Path(args.out) / "model.safetensors").unlink()  # without its map it would be scored as another model


if __name__ == "__main__":
    run_script(main)
