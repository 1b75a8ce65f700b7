"""How fast are training and the student? Against the bare matrix products of a training step, and against the teacher.

    python studies/speed.py                                                        # training, Pythia-70M's shape
    python studies/speed.py --width 1024 --heads 16 --layers 24 --start 6 --end 18 --seq-len 1024    # Pythia-410M's
    python studies/speed.py --run runs/fw-6-18                                     # a student over its teacher

The floor is the matrix products of layers 0..end-1 forward, and of the velocity forward and backward, with full attention, in the
number format of training. Training takes the steps of train_fm.py on a teacher with random weights and one batch of random ids,
without loading text or scoring. Everything takes turns in one process, so that load on the machine slows all of it alike.
"""
import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from eval_kl import DEVICE, forward_times, load_student, pick_device
from lft import VelocityBlock, backbone, check_span, hidden_pair, load_teacher, run_script, trunk_of
from train_fm import at_least, autocast, flow_matching_loss, make_optimizers
from train_fw import flow_walking_loss

METHODS = {"flow matching": (flow_matching_loss, 1), "Flow Walking": (flow_walking_loss, 6)}  # and velocity evaluations in a step


def start_training(args, device, loss_of, compiled):
    """What train_fm.train has before its loop, for a GPT-NeoX of the given shape."""
    config = GPTNeoXConfig(hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.layers,
                           num_attention_heads=args.heads, max_position_embeddings=args.seq_len)  # fmt: skip
    teacher = GPTNeoXForCausalLM._from_config(config).requires_grad_(False).eval().to(device)
    check_span(teacher, args.start, args.end)
    if compiled and device.type == "cpu":
        teacher.set_attn_implementation("eager")
    velocity, trunk = VelocityBlock(backbone(teacher).layers[args.start]).to(device), trunk_of(teacher, args.end)
    for frozen in trunk.layers if compiled else ():
        frozen.forward = torch.compile(frozen.forward)
    return SimpleNamespace(trunk=trunk, start=args.start, device=device, velocity=velocity, optimizers=make_optimizers(velocity),
                           u=torch.compile(velocity) if compiled else velocity, loss_of=loss_of)  # fmt: skip


def forward_backward(training, ids):
    with autocast(training.device):
        x0, x1, context = hidden_pair(training.trunk, ids, training.start)
        loss = training.loss_of(functools.partial(training.u, **context), x0, x1)
    loss.backward()


def update(training):
    nn.utils.clip_grad_norm_(training.velocity.parameters(), 1.0).item()
    for optimizer in training.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def matrix_products(args, layer, evaluations, device):
    """The pairs of matrices that the floor multiplies. layer: one of the teacher's, whose shapes are taken."""
    dtype = torch.bfloat16 if autocast(device)._enabled else torch.float32
    random = functools.partial(torch.randn, dtype=dtype, device=device)
    values = random(args.batch_size, args.heads, args.seq_len, args.width // args.heads)
    scores = random(args.batch_size, args.heads, args.seq_len, args.seq_len)
    forward = [(values, values.mT), (scores, values)]
    backward = [(values, values.mT), (scores, values), (scores.mT, values), (scores.mT, values)]
    for weight in (module.weight.to(dtype) for module in layer.modules() if isinstance(module, nn.Linear)):
        x, y = (random(args.batch_size * args.seq_len, width) for width in reversed(weight.shape))
        forward.append((x, weight.T))
        backward += [(y, weight), (y.T, x)]
    return forward * (args.end + evaluations) + backward * evaluations


def multiply(products):
    for a, b in products:
        a @ b


def seconds(device, function, *args, **options):
    begin = time.perf_counter()
    function(*args, **options)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def measure_training(args, device, name):
    """Print the speed of a method's training, plain and compiled, over that of its floor."""
    loss_of, evaluations = METHODS[name]
    trainings = {how: start_training(args, device, loss_of, how == "compiled") for how in ("plain", "compiled")}
    products = matrix_products(args, trainings["plain"].trunk.layers[0], evaluations, device)
    ids = torch.randint(50304, (args.batch_size, args.seq_len), device=device)
    times = {how: [] for how in trainings}  # of the floor, of forward and backward, of the optimizers
    for _ in range(2 + args.rounds):  # two to warm up
        floor = seconds(device, multiply, products)
        for how, training in trainings.items():
            times[how].append((floor, seconds(device, forward_backward, training, ids), seconds(device, update, training)))
    for how, rounds in times.items():
        ratio = statistics.median(floor / (computing + updating) for floor, computing, updating in rounds[2:])
        floor, computing, updating = map(statistics.median, zip(*rounds[2:]))
        print(f"{name}, {how}: {ids.numel() / (computing + updating):,.0f} tokens per second, {ratio:.2f} of the floor's; floor "
              f"{1e3 * floor:.1f} ms, forward and backward {1e3 * computing:.1f} ms, optimizers {1e3 * updating:.1f} ms")  # fmt: skip


def measure_student(run, device, rounds, prompt=64, tokens=64):
    """Print the times of a student's forward pass and of its decoding, over those of its teacher."""
    student = load_student(run, device)
    models = [load_teacher(student.config.teacher, device)[0], student]
    ids = torch.randint(models[0].config.vocab_size, (1, student.config.training["seq_len"]), device=device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    times = [[seconds(device, model.generate, ids[:, :prompt], **options) for model in models] for _ in range(1 + rounds)]
    decoding = statistics.median(student / teacher for teacher, student in times[1:])
    print(f"{run} over its teacher: forward pass {forward_times(models, ids, rounds)[1]:.2f}, decoding with a cache {decoding:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", help="time the student in this run's folder instead of training")
    add("--width", type=at_least(1), default=512, help="hidden size")
    add("--heads", type=at_least(1), default=8, help="attention heads")
    add("--layers", type=at_least(1), default=6, help="layers of the teacher")
    add("--start", type=int, default=1, help="first layer to replace")
    add("--end", type=int, default=5, help="first layer to keep after the span")
    add("--batch-size", type=at_least(1), default=8, help="sequences per step")
    add("--seq-len", type=at_least(2), default=256, help="tokens per sequence")
    add("--rounds", type=at_least(1), default=12, help="rounds to time")
    add("--device", default=DEVICE, help="cpu, cuda or mps")
    args = parser.parse_args()
    if args.run:
        return measure_student(args.run, pick_device(args.device), args.rounds)
    for name in METHODS:
        measure_training(args, pick_device(args.device), name)


if __name__ == "__main__":
    run_script(main)
