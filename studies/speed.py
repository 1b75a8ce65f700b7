"""How fast is training? Against the bare matrix products of a training step.

    python studies/speed.py                                          # Pythia-70M's shape
    python studies/speed.py --width 1024 --end 18 --seq-len 1024     # Pythia-410M's

The floor is the matrix products of layers 0..end-1 forward and of the velocity forward and backward, full attention.
Training takes the steps of loop.py on random weights and ids, without reading text or scoring. Both are timed in turns.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lft import VelocityBlock, hidden_pair, trunk_of
from loop import autocast, make_optimizers, update
from run import DEVICES, run_script
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss

METHODS = {
    "flow matching": (flow_matching_loss, 1),
    "Flow Walking": (flow_walking_loss, 6),
}  # and evaluations in a step


def start_training(args, device):
    """The decoder up to the end of the span, and a velocity, for a GPT-NeoX of the given shape."""
    config = GPTNeoXConfig(
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.end,
        num_attention_heads=args.width // 64,
        max_position_embeddings=args.seq_len,
    )
    teacher = GPTNeoXForCausalLM._from_config(config).requires_grad_(False).eval().to(device)
    if args.compile and device.type == "cpu":
        teacher.set_attn_implementation("eager")
    velocity = VelocityBlock(teacher.get_decoder().layers[0]).to(device)
    trunk = trunk_of(teacher, args.end)
    if args.compile:
        for module in (velocity, *trunk.layers):
            module.forward = torch.compile(module.forward)
    return trunk, velocity


def step(trunk, velocity, optimizers, loss_of, ids):
    """One step of loop.py."""
    with autocast(ids.device):
        x0, x1, context = hidden_pair(trunk, ids, start=0)
        loss = loss_of(functools.partial(velocity, **context), x0, x1)
    loss.backward()
    nn.utils.clip_grad_norm_(velocity.parameters(), 1.0).item()
    update(optimizers, lr=1e-3)


def matrix_products(args, layer, evaluations, device):
    """The pairs of matrices that the floor multiplies. layer: one of the teacher's, whose shapes are taken."""
    dtype = torch.float32
    if autocast(device)._enabled:
        dtype = torch.bfloat16
    random = functools.partial(torch.randn, dtype=dtype, device=device)
    values = random(args.batch_size, args.width // 64, args.seq_len, 64)
    scores = random(args.batch_size, args.width // 64, args.seq_len, args.seq_len)
    forward = [(values, values.mT), (scores, values)]
    backward = [(values, values.mT), (scores, values), (scores.mT, values), (scores.mT, values)]
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.to(dtype)
            x = random(args.batch_size * args.seq_len, weight.shape[1])
            y = random(args.batch_size * args.seq_len, weight.shape[0])
            forward.append((x, weight.T))
            backward.extend([(y, weight), (y.T, x)])
    return forward * (args.end + evaluations) + backward * evaluations


def multiply(products):
    for a, b in products:
        a @ b


def seconds(function, *args):
    begin = time.perf_counter()
    function(*args)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def measure(args, device, name, loss_of, evaluations):
    """Print the speed of a method's training over that of its floor."""
    trunk, velocity = start_training(args, device)
    optimizers = make_optimizers(velocity)
    products = matrix_products(args, trunk.layers[0], evaluations, device)
    ids = torch.randint(50304, (args.batch_size, args.seq_len), device=device)
    floors = []
    steps = []
    for _ in range(2 + args.rounds):  # two to warm up
        floors.append(seconds(multiply, products))
        steps.append(seconds(step, trunk, velocity, optimizers, loss_of, ids))
    whole = statistics.median(steps[2:])
    share = statistics.median(floors[2:]) / whole
    print(f"{name}: {ids.numel() / whole:,.0f} tokens per second, {share:.2f} of the floor's")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--width", type=int, default=512, help="hidden size, in heads of 64 (default: %(default)s)")
    add("--end", type=int, default=5, help="first layer to keep after the span (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences per step (default: %(default)s)")
    add("--seq-len", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    add("--compile", action="store_true", help="as for train_fm.py")
    add("--rounds", type=int, default=12, help="rounds to time (default: %(default)s)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run (default: %(default)s)")
    args = parser.parse_args()
    for name, (loss_of, evaluations) in METHODS.items():
        measure(args, torch.device(args.device), name, loss_of, evaluations)


if __name__ == "__main__":
    run_script(main)
