"""Train a velocity field by flow matching (Eq. 3, Alg. 1) to stand in for a span of a teacher's layers.

    python train_fm.py --start 6 --end 12      # one flow for layers 6..11

On a CUDA GPU the teacher is Pythia-410M and the text the Pile, streamed; on a machine without one, the embedded teacher
and the source of Python's standard library. The training loop below is also that of train_fw.py.
"""
import argparse
import functools
import itertools
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval_kl import evaluate, flow_row, kl_text, skip_row, summarise
from lft import (
    TINY_TEACHER, FlowLayer, InputError, VelocityBlock, check_positive, check_seq_len, check_span, default_seq_len,
    describe_teacher, held_out_tokens, hidden_pair, layer_range, load_teacher, pick_device, run_script, save_flow, token_batches,
)  # fmt: skip


def flow_matching_loss(velocity, x0, x1):
    """Flow matching (Eq. 3, Alg. 1): the velocity on the straight path from x0 to x1 is to be x1 - x0.

    velocity: a function of (x, t). x0, x1: (batch, seq, hidden). Returns the mean square over all elements.
    """
    t = torch.rand(len(x0), 1, 1, device=x0.device)  # one time for each sequence
    x_t = (1 - t) * x0 + t * x1
    return F.mse_loss(velocity(x_t, t), x1 - x0)  # Eq. 3


def parse_arguments(description, method, start, end, lr_times_width):
    """The options that both methods share, with the defaults of one: its span, and its learning rate times the width."""
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(lr_times_width=lr_times_width)
    add = parser.add_argument
    add("--start", type=int, default=start, help="first layer that is replaced (default %(default)s)")
    add("--end", type=int, default=end, help="first layer after the span, not replaced (default %(default)s)")
    add("--teacher", help=f"{TINY_TEACHER}, a folder, or a GPT-NeoX on the hub (default: EleutherAI/pythia-410m on a CUDA GPU, else {TINY_TEACHER})")
    add("--data", help="stdlib, a text file, a glob, or a hub data set (default: stdlib for tiny_teacher, else monology/pile-uncopyrighted)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--out", help=f"folder for the run (default runs/{method}-START-END)")
    add("--overwrite", action="store_true", help="replace the run that --out holds (default: refuse)")
    add("--max-steps", type=int, default=2000, help="optimizer steps (default %(default)s)")
    add("--batch-size", type=int, default=16, help="sequences in a step (default %(default)s)")
    add("--seq-len", type=int, help="tokens in a sequence (default: half the teacher's positions)")
    add("--lr", type=float, help=f"peak learning rate (default: {lr_times_width} / the teacher's width)")
    add("--seed", type=int, default=0, help="seed of the weights, the times and the order of local text (default %(default)s)")
    add("--init", default="middle", help="where the velocity's weights start: middle or first layer of the span, a layer's number, or random (default %(default)s)")
    return parser


def init_layer(teacher, args):
    """The teacher layer that --init names, or None for random weights."""
    layers = teacher.gpt_neox.layers
    named = {"middle": layers[(args.start + args.end) // 2], "first": layers[args.start], "random": None}
    named |= {str(number): layer for number, layer in enumerate(layers)}
    if args.init not in named:
        raise InputError(f"--init {args.init} is no layer: give middle, first, random or 0..{len(layers) - 1}")
    return named[args.init]


def autocast(device):
    """bfloat16 for the matrix products, where the hardware has instructions for it; otherwise nothing."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


EVALUATE_EVERY = 250  # steps
EVALUATE_TOKENS = 16_384
WARM_UP = 50  # steps


def train(args, method, loss_of, solver, steps, notes=None):
    """Train a flow and save it: the loop of both methods.

    loss_of: the loss, a function of (velocity, x0, x1). solver, steps: how the flow is integrated when it is evaluated.
    notes: what flow.json is to say of the method's own options. Raises InputError before anything is written.
    """
    check_positive(args, "max_steps", "batch_size", "seq_len", "lr")
    device = pick_device(args.device)
    teacher_name = args.teacher or ("EleutherAI/pythia-410m" if device.type == "cuda" else TINY_TEACHER)
    data = args.data or ("stdlib" if teacher_name == TINY_TEACHER else "monology/pile-uncopyrighted")
    out = Path(args.out or f"runs/{method}-{args.start}-{args.end}")
    occupied = any((out / name).exists() for name in ("flow.json", "flow.safetensors"))
    if occupied and not args.overwrite:
        raise InputError(f"{out} holds a run already: give another --out, or --overwrite to replace it")
    teacher, tokenizer = load_teacher(teacher_name, device)
    check_span(teacher, args.start, args.end)
    seq_len = args.seq_len or default_seq_len(teacher)
    check_seq_len(teacher, seq_len)
    torch.manual_seed(args.seed)
    velocity = VelocityBlock(teacher.config, init_layer(teacher, args)).to(device)
    held_out = held_out_tokens(data, tokenizer, seq_len, EVALUATE_TOKENS)
    batches = token_batches(data, tokenizer, args.batch_size, seq_len, args.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made a folder ({error.strerror}): give another") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out} cannot be written to: give another")
    layers = f"layers {layer_range(args.start, args.end)}, {args.end - args.start} of {teacher.config.num_hidden_layers}"
    print(f"teacher {teacher_name}, data {data}, on {device}: one flow replaces {layers}", flush=True)

    lr = args.lr or args.lr_times_width / teacher.config.hidden_size
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=lr, betas=(0.9, 0.95))

    def lr_factor(step):  # half a cosine from the peak down to a twentieth of it, times a linear warm-up
        return min(1, (step + 1) / WARM_UP) * (0.525 + 0.475 * math.cos(math.pi * step / args.max_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)

    student = flow_row(FlowLayer(velocity, args.start, args.end, solver, steps))
    dropped = skip_row(args.start, args.end - args.start, args.end)

    def score(row):
        velocity.eval()
        summary = summarise(evaluate(teacher, held_out, args.end, {"row": row})["row"])
        velocity.train()
        return summary

    def text_of(summary):
        return f"NMSE {summary['nmse']:.4f}, KL {kl_text(summary)}"

    def save(done):
        save_flow(out, velocity, {
            "method": method, "teacher": teacher_name, "teacher_is": teacher_is, "data": data, "start": args.start,
            "end": args.end, "solver": solver, "steps": steps, **(notes or {}), "init": args.init, "lr": lr,
            "batch_size": args.batch_size, "seq_len": seq_len, "max_steps": args.max_steps, "seed": args.seed,
            "trained_steps": done, "trained_tokens": done * args.batch_size * seq_len,
        })  # fmt: skip

    teacher_is = describe_teacher(teacher)
    done, stopped, good = 0, None, None  # good: the last weights that gave a finite loss
    progress = tqdm(total=args.max_steps * args.batch_size * seq_len, unit="tok", unit_scale=True)
    try:
        for ids in itertools.islice(batches, args.max_steps):
            with autocast(device):
                x0, x1, context = hidden_pair(teacher, ids.to(device), args.start, args.end)
                loss = loss_of(functools.partial(velocity, **context), x0, x1)
            if not loss.isfinite():
                stopped = f"the loss of step {done + 1} is {loss.item()}: try a lower --lr"
                if good:  # the last update spoilt the weights: take it back
                    velocity.load_state_dict(good)
                    done -= 1
                break
            good = {name: weight.clone() for name, weight in velocity.state_dict().items()}
            loss.backward()
            torch.nn.utils.clip_grad_norm_(velocity.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            progress.update(ids.numel())
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if done % EVALUATE_EVERY == 0 or done == args.max_steps:
                summary = score(student)
                if not math.isfinite(summary["kl"]):
                    stopped = f"the held-out KL after step {done} is {summary['kl']}: try a lower --lr"
                    velocity.load_state_dict(good)
                    done -= 1
                    break
                progress.write(f"step {done}: held-out {text_of(summary)}")
                save(done)
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:  # whatever ended the loop, what it trained is kept
        progress.close()
        saved = good and (done or not occupied)  # an untrained flow is nothing to overwrite a run with
        if saved:
            save(done)
    if stopped:
        sys.exit(f"{stopped}; {out} holds the flow of step {done}" if saved else f"{stopped}; nothing was saved")
    print("held-out text, KL in nats per token, lower is better")
    print(f"  student       {text_of(summary)}\n  span dropped  {text_of(score(dropped))}")
    print(f"saved in {out}: python eval_kl.py {out}")


def main():
    args = parse_arguments(__doc__.splitlines()[0], "fm", 6, 12, lr_times_width=2.0).parse_args()
    train(args, "fm", flow_matching_loss, solver="midpoint", steps=1)


if __name__ == "__main__":
    run_script(main)
