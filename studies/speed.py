"""How fast are training and the student? Against the bare matrix products of a training step, and against the teacher.

    python studies/speed.py                                                                # training, Pythia-70M's shape
    python studies/speed.py --width 1024 --end 18 --seq-len 1024     # Pythia-410M's
    python studies/speed.py --run runs/fw-6-18                                             # a student

The floor is the matrix products of layers 0..end-1 forward and of the velocity forward and backward, full attention. Training
takes the steps of train_fm.py on random weights and ids, without reading text or scoring. What is compared is timed in turns.
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

from eval_kl import DEVICES, evaluate, load_student
from lft import VelocityBlock, hidden_pair, load_teacher, run_script, trunk_of
from train_fm import autocast, flow_matching_loss, make_optimizers
from train_fw import flow_walking_loss

METHODS = {"flow matching": (flow_matching_loss, 1), "Flow Walking": (flow_walking_loss, 6)}  # and velocity evaluations in a step


def start_training(args, device):
    """The decoder up to the end of the span, the velocity and its optimizers, for a GPT-NeoX of the given shape."""
    config = GPTNeoXConfig(hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.end,
                           num_attention_heads=args.width // 64, max_position_embeddings=args.seq_len)  # fmt: skip
    teacher = GPTNeoXForCausalLM._from_config(config).requires_grad_(False).eval().to(device)
    if args.compile and device.type == "cpu":
        teacher.set_attn_implementation("eager")
    u, trunk = VelocityBlock(teacher.get_decoder().layers[0]).to(device), trunk_of(teacher, args.end)
    for module in (u, *trunk.layers) if args.compile else ():
        module.forward = torch.compile(module.forward)
    return trunk, u, make_optimizers(u)


def step(trunk, u, optimizers, loss_of, ids):
    """One step of the loop in train_fm.py."""
    with autocast(ids.device):
        x0, x1, context = hidden_pair(trunk, ids, start=0)
        loss = loss_of(functools.partial(u, **context), x0, x1)
    loss.backward()
    nn.utils.clip_grad_norm_(u.parameters(), 1.0).item()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def matrix_products(args, layer, evaluations, device):
    """The pairs of matrices that the floor multiplies. layer: one of the teacher's, whose shapes are taken."""
    dtype = torch.bfloat16 if autocast(device)._enabled else torch.float32
    random = functools.partial(torch.randn, dtype=dtype, device=device)
    values = random(args.batch_size, args.width // 64, args.seq_len, 64)
    scores = random(args.batch_size, args.width // 64, args.seq_len, args.seq_len)
    forward = [(values, values.mT), (scores, values)]
    backward = [(values, values.mT), (scores, values), (scores.mT, values), (scores.mT, values)]
    for weight in (module.weight.to(dtype) for module in layer.modules() if isinstance(module, nn.Linear)):
        x, y = (random(args.batch_size * args.seq_len, width) for width in reversed(weight.shape))
        forward.append((x, weight.T))
        backward += [(y, weight), (y.T, x)]
    return forward * (args.end + evaluations) + backward * evaluations


def seconds(function, *args, **options):
    begin = time.perf_counter()
    function(*args, **options)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def measure_training(args, device, name, loss_of, evaluations):
    """Print the speed of a method's training over that of its floor."""
    training, rounds = start_training(args, device), []
    products = matrix_products(args, training[0].layers[0], evaluations, device)
    ids = torch.randint(50304, (args.batch_size, args.seq_len), device=device)
    for _ in range(2 + args.rounds):  # two to warm up
        floor = seconds(lambda: [a @ b for a, b in products])
        rounds.append((floor, seconds(step, *training, loss_of, ids)))
    floor, whole = map(statistics.median, zip(*rounds[2:]))
    print(f"{name}: {ids.numel() / whole:,.0f} tokens per second, {floor / whole:.2f} of the floor's")


def measure_student(run, device, rounds, tokens=32):
    """Print the time of a student's forward pass and of its decoding, over its teacher's."""
    student = load_student(run, device)
    models = [load_teacher(student.config.teacher, device)[0], student]
    ids = torch.randint(models[0].config.vocab_size, (1, student.config.training["seq_len"]), device=device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    times = [[seconds(model.generate, ids[:, :tokens], **options) for model in models] for _ in range(1 + rounds)]
    decoding = statistics.median(student / teacher for teacher, student in times[1:])  # the first round warms up
    rows, config = torch.randint(models[0].config.vocab_size, (1024 * rounds // ids.shape[1], ids.shape[1])), student.config
    forward = evaluate(models[0], {"student": student}, rows, config.start, config.end)["student"]["time"].median().item()
    print(f"time over the teacher's: forward pass {forward:.2f}, cached decoding {decoding:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", help="time the student in this run's folder instead of training")
    add("--width", type=int, default=512, help="hidden size, in heads of 64")
    add("--end", type=int, default=5, help="first layer to keep after the span; where the span starts does not matter")
    add("--batch-size", type=int, default=8, help="sequences per step")
    add("--seq-len", type=int, default=256, help="tokens per sequence")
    add("--compile", action="store_true", help="as for train_fm.py")
    add("--rounds", type=int, default=12, help="rounds to time")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run")
    args = parser.parse_args()
    device = torch.device(args.device)
    for name, method in METHODS.items() if not args.run else ():
        measure_training(args, device, name, *method)
    if args.run:
        measure_student(args.run, device, args.rounds)


if __name__ == "__main__":
    run_script(main)
