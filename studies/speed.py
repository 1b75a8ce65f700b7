"""How fast training is, against the matrix products alone of the layers that it runs.

    python studies/speed.py                                                                # Pythia-70M's shape
    python studies/speed.py --width 1024 --heads 16 --layers 24 --start 6 --end 18 --seq-len 1024    # Pythia-410M's, for a GPU

The floor is the matrix products of `end` layers forward, and of the velocity's evaluations forward and backward, attention in
full as if it were not causal, in the number format of training. Training is that of train_fm.py and train_fw.py, step
for step, on a teacher of random weights and one batch of random ids: loading of text and scoring are left out. All take turns
in one process, so that what else the machine does hits all alike; its peak memory is of all of them.
"""
import argparse
import functools
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lft import EVALUATIONS, InputError, LFTConfig, LFTForCausalLM, backbone, hidden_pair, pick_device, replace_span, run_script, trunk_of
from train_fm import autocast, flow_matching_loss, logits_after, one_or_more, optimizers_of, prepare, step_all
from train_fw import flow_walking_loss

LEARNING_RATE = 1e-4
WARM_UP = 2  # rounds that are not counted
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 operations per second, dense
METHODS = {  # loss, solver and k of the student, evaluations of the velocity in a step of training
    "flow matching": (flow_matching_loss, "midpoint", 1, 1),
    "Flow Walking": (flow_walking_loss, "midpoint", 3, 3 * EVALUATIONS["midpoint"]),
}


def random_teacher(args, device):
    """A GPT-NeoX of the given shape with random weights, frozen."""
    if args.width % (8 * args.heads):  # a quarter of a head is turned by the rotary embedding, in pairs
        raise InputError(f"--width {args.width} is no multiple of 8 x --heads {args.heads}: give one that is")
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, max_position_embeddings=max(2048, args.seq_len),
    )  # fmt: skip
    return GPTNeoXForCausalLM._from_config(config).requires_grad_(False).eval().to(device)


class Training:
    """Training as train_fm.py does it, a step at a time: `forward_backward`, then `update`."""

    def __init__(self, args, device, loss_of, solver, k, compiled):
        teacher = random_teacher(args, device)
        if compiled and device.type == "cpu":
            teacher.set_attn_implementation("eager")
        student = LFTForCausalLM(LFTConfig(teacher.config.to_dict(), args.start, args.end, solver, k), teacher).eval().to(device)
        velocity = student.flow.velocity
        self.optimizers, self.weights = optimizers_of(velocity, LEARNING_RATE), list(velocity.parameters())
        self.trunk = prepare(trunk_of(teacher, args.end), device, compiled)
        self.head = prepare(replace_span(teacher, 0, args.end), device, compiled)
        self.u = torch.compile(velocity) if compiled else velocity
        self.start, self.device, self.loss_of = args.start, device, loss_of

    def forward_backward(self, ids):
        with autocast(self.device):
            x0, x1, context = hidden_pair(self.trunk, ids, self.start)
            loss = self.loss_of(functools.partial(self.u, **context), x0, x1, functools.partial(logits_after, self.head))
        loss.backward()

    def update(self):
        nn.utils.clip_grad_norm_(self.weights, 1.0).item()
        step_all(self.optimizers, LEARNING_RATE)


def matrix_products(args, layer, evaluations, device):
    """The pairs of matrices that the floor multiplies: of `end` layers forward, of the velocity forward and backward.

    layer: the teacher's, whose shapes are taken.
    """
    dtype = torch.bfloat16 if autocast(device)._enabled else torch.float32
    options, head_width = {"dtype": dtype, "device": device}, args.width // args.heads
    values = torch.randn(args.batch_size, args.heads, args.seq_len, head_width, **options)
    scores = torch.randn(args.batch_size, args.heads, args.seq_len, args.seq_len, **options)
    forward = [(values, values.mT), (scores, values)]
    backward = [(values, values.mT), (scores, values), (scores.mT, values), (scores.mT, values)]
    for weight in (module.weight for module in layer.modules() if isinstance(module, nn.Linear)):
        x, y = (torch.randn(args.batch_size * args.seq_len, width, **options) for width in reversed(weight.shape))
        weight = weight.to(dtype)
        forward.append((x, weight.T))
        backward += [(y, weight), (y.T, x)]
    return forward * (args.end + evaluations) + backward * evaluations


def multiply(products):
    """The floor's work."""
    for a, b in products:
        a @ b


def seconds(device, function, *args):
    """The time of one call."""
    begin = time.perf_counter()
    function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(args, device, name):
    """Print the speed of a method, plain and compiled, over that of its floor."""
    loss_of, solver, k, evaluations = METHODS[name]
    trainings = {how: Training(args, device, loss_of, solver, k, how == "compiled") for how in ("plain", "compiled")}
    products = matrix_products(args, backbone(trainings["plain"].trunk).layers[0], evaluations, device)
    ids = torch.randint(50304, (args.batch_size, args.seq_len), device=device)
    floor, times = [], {how: [] for how in trainings}
    for _ in range(WARM_UP + args.rounds):
        floor.append(seconds(device, multiply, products))
        for how, training in trainings.items():
            times[how].append((seconds(device, training.forward_backward, ids), seconds(device, training.update)))
    floor, tokens = floor[WARM_UP:], args.batch_size * args.seq_len
    operations = sum(2 * a.numel() * b.shape[-1] for a, b in products)
    peaks = [peak for gpu, peak in PEAKS.items() if device.type == "cuda" and gpu in torch.cuda.get_device_name(device)]
    print(f"{name}: floor {operations / 1e9:,.1f} billion operations, {1e3 * statistics.median(floor):.1f} ms")
    for how, pairs in times.items():
        pairs = pairs[WARM_UP:]
        step = statistics.median(map(sum, pairs))
        ratios = [f / sum(pair) for f, pair in zip(floor, pairs)]
        computing, updating = (1e3 * statistics.median(part) for part in zip(*pairs))
        print(
            f"  {how + ':':9} {tokens / step:,.0f} tokens per second, {statistics.median(ratios):.2f} of the floor's "
            f"({min(ratios):.2f} to {max(ratios):.2f}); forward and backward {computing:.1f} ms, optimizers {updating:.1f} ms"
            + (f"; {operations / step / peaks[0]:.1%} of the GPU's peak" if peaks else "")
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--width", type=one_or_more, default=512, help="of the hidden state (default %(default)s)")
    add("--heads", type=one_or_more, default=8, help="of the attention (default %(default)s)")
    add("--layers", type=one_or_more, default=6, help="of the teacher (default %(default)s)")
    add("--start", type=int, default=1, help="first layer that is replaced (default %(default)s)")
    add("--end", type=int, default=5, help="first layer after the span, not replaced (default %(default)s)")
    add("--batch-size", type=one_or_more, default=8, help="sequences in a step (default %(default)s)")
    add("--seq-len", type=one_or_more, default=256, help="tokens in a sequence (default %(default)s)")
    add("--rounds", type=one_or_more, default=12, help=f"steps that are timed, after {WARM_UP} to warm up (default %(default)s)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    for name in METHODS:
        measure(args, device, name)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 2**30:.2f} GiB on {device}, of this process, plain and compiled together")


if __name__ == "__main__":
    run_script(main)
