"""How fast is training? Against the speed of one large matrix product.

    python studies/speed.py                                          # Pythia-70M's shape
    python studies/speed.py --width 1024 --end 18 --seq-len 1024     # Pythia-410M's

Training takes the steps of loop.py on random weights and ids, without reading text or scoring. The operations of a step
are those of its matrix products, attention without the causal mask's savings. Both are timed in turns.
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lft import VelocityBlock, hidden_pair, trunk_of
from loop import autocast, make_optimizers, update
from run import DEVICES, run_script
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss

METHODS = {"flow matching": flow_matching_loss, "Flow Walking": flow_walking_loss}
SIDE = 4096  # of the square matrices that are multiplied


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
    if device.type == "cpu":
        teacher.set_attn_implementation("eager")
    velocity = VelocityBlock(teacher.get_decoder().layers[0]).to(device)
    return trunk_of(teacher, args.end), velocity


def step(trunk, velocity, optimizers, loss_of, ids):
    """One step of loop.py."""
    with autocast(ids.device):
        x0, x1, context = hidden_pair(trunk, ids, start=0)
        loss = loss_of(functools.partial(velocity, **context), x0, x1)
    loss.backward()
    nn.utils.clip_grad_norm_(velocity.parameters(), 1.0).item()
    update(optimizers, lr=1e-3)


def operations(*step_args):
    """Floating-point operations of the matrix products of a step."""
    with FlopCounterMode(display=False) as counter:
        step(*step_args)
    return counter.get_total_flops()


def seconds(function, *args):
    begin = time.perf_counter()
    function(*args)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def measure(args, device, name, loss_of):
    """Print the speed of a method's training, and its share of the speed of a large matrix product."""
    trunk, velocity = start_training(args, device)
    ids = torch.randint(50304, (8, args.seq_len), device=device)
    step_args = (trunk, velocity, make_optimizers(velocity), loss_of, ids)
    count = operations(*step_args)
    if args.compile:
        for module in (velocity, *trunk.layers):
            module.forward = torch.compile(module.forward)
    dtype = torch.bfloat16 if autocast(device)._enabled else torch.float32
    matrix = torch.randn(SIDE, SIDE, dtype=dtype, device=device)
    products = []
    steps = []
    for _ in range(14):  # two to warm up
        products.append(seconds(torch.mm, matrix, matrix))
        steps.append(seconds(step, *step_args))
    whole = statistics.median(steps[2:])
    share = count / whole * statistics.median(products[2:]) / (2 * SIDE**3)
    print(f"{name}: {ids.numel() / whole:,.0f} tokens per second, {share:.2f} of the matrix product's speed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--width", type=int, default=512, help="hidden size, in heads of 64 (default: %(default)s)")
    add("--end", type=int, default=5, help="first layer to keep after the span (default: %(default)s)")
    add("--seq-len", type=int, default=256, help="tokens per sequence, of which a step has 8 (default: %(default)s)")
    add("--compile", action="store_true", help="as for train_fm.py")
    args = parser.parse_args()
    for name, loss_of in METHODS.items():
        measure(args, torch.device(DEVICES[0]), name, loss_of)


if __name__ == "__main__":
    run_script(main)
