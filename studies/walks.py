"""What makes Flow Walking better? Variants of its loss, start and velocity, trained by train_fw.py's loop.

    python studies/walks.py equal --teacher smollm2 --data stdlib --start 12 --end 24 --max-steps 1000

    equal      k equal steps, those the student is used with, instead of random times
    timeless   equal, and the velocity never sees t: the time network stays at zero
    waypoints  equal, and each landing is also compared with the teacher's state at that depth; this term fades out
    linear     equal, from the least-squares map: the flow starts at W x0 + b, with its gates at zero
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_fm
from eval_kl import fit_linear, token_errors
from lft import SOLVERS, FlowLayer, LFTForCausalLM, VelocityBlock, hidden_pair, run_script, trunk_of

K, SOLVER = 3, "midpoint"


def equal_loss(velocity, x0, x1, logits):
    """Flow Walking (Eq. 8) through equal times."""
    for i in range(K):
        x0 = SOLVERS[SOLVER](velocity, x0, i / K, (i + 1) / K)
    return token_errors(x0 - x1, x1).mean()


class Timeless(VelocityBlock):
    def __init__(self, layer):
        super().__init__(layer)
        self.time_mlp.requires_grad_(False)  # its last layer starts at zero


class Waypoints:
    """`equal_loss`, plus the landings' distance from the teacher's states at equal depths, with a weight that falls to 0."""

    def __init__(self, args):
        self.states, self.steps, self.depths = [], iter(range(args.max_steps * args.accumulate)), []
        self.depths = [args.start + (args.end - args.start) * i // K for i in range(1, K)]
        self.total = args.max_steps * args.accumulate

    def trunk_of(self, teacher, end):
        trunk = trunk_of(teacher, end)
        for depth in self.depths:
            trunk.layers[depth].register_forward_pre_hook(lambda _, x: self.states.append(x[0]))
        return trunk

    def loss(self, velocity, x0, x1, logits):
        targets, weight, loss = [*self.states, x1], 1 - next(self.steps) / self.total, 0
        self.states.clear()
        for i, target in enumerate(targets):
            x0 = SOLVERS[SOLVER](velocity, x0, i / K, (i + 1) / K)
            loss = loss + (1 if i == K - 1 else weight) * token_errors(x0 - target, target).mean()
        return loss


class LinearStart:
    """Puts the least-squares map before the flow, in training and in the student's layer."""

    def make_student(self, args, *rest):
        teacher, tokenizer, student = make_student(args, *rest)
        rows = train_fm.training_rows(args.data, tokenizer, args.seq_len)
        rows = torch.tensor([row["ids"] for _, row in zip(range(32_768 // args.seq_len), rows)])
        self.linear = fit_linear(teacher, rows, args.start, args.end)
        student.flow.velocity.time_mlp[-1].bias.data.view(6, -1)[[2, 5]] = -1.0  # α = 1 + gate = 0
        student.flow.walk = lambda velocity, x: FlowLayer.walk(student.flow, velocity, self.linear(x))
        return teacher, tokenizer, student

    def hidden_pair(self, trunk, ids, start):
        x0, x1, context = hidden_pair(trunk, ids, start)
        return self.linear(x0), x1, context


make_student = train_fm.make_student


def main():
    variant = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    parser = train_fm.make_parser(__doc__, variant, start=12, end=24, init="middle")
    args, loss = parser.parse_args(), equal_loss
    if variant == "timeless":
        LFTForCausalLM.velocity_class = Timeless
    elif variant == "waypoints":
        waypoints = Waypoints(args)
        train_fm.trunk_of, loss = waypoints.trunk_of, waypoints.loss
    elif variant == "linear":
        start = LinearStart()
        train_fm.make_student, train_fm.hidden_pair = start.make_student, start.hidden_pair
    elif variant != "equal":
        parser.error("the first argument is equal, timeless, waypoints or linear")
    train_fm.train(args, loss, SOLVER, K)
    if variant == "linear":
        (Path(args.out) / "model.safetensors").unlink()  # it lacks the linear map; the scores in log.jsonl do not


if __name__ == "__main__":
    run_script(main)
