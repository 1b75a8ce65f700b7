"""Train a velocity field by flow matching (Eq. 3, Alg. 1) to stand in for a span of a teacher's layers.

    python train_fm.py --start 6 --end 12              # one flow for layers 6..11
    python train_fm.py --resume runs/fm-6-12           # go on with a run that was stopped, as if it had not been
    torchrun --nproc_per_node 4 -- train_fm.py …       # on four GPUs

On a CUDA GPU the teacher is Pythia-410M and the text the Pile, streamed; on a machine without one, the embedded teacher
and the source of Python's standard library. The training loop below is also that of train_fw.py.
"""
import argparse
import functools
import io
import json
import math
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import held_out_rows, training_rows
from eval_kl import evaluate, summarize
from lft import (
    TINY_TEACHER, UNREADABLE, InputError, LFTConfig, LFTForCausalLM, backbone, fingerprint, first_line, hidden_pair, load_teacher,
    pick_device, replace_span, run_script, save_flow, trunk_of, write_whole,
)  # fmt: skip


def mean_square(error, x1, token_power):
    """The mean over tokens of each one's squared error, divided by its |x1| to the power token_power.

    error, x1: (batch, seq, hidden). |x1| is taken as a root mean square over hidden. Language models have a few tokens, the first of
    a sequence above all, whose states are far longer than the others' (massive activations). With power 0, the paper's plain mean,
    they make up nearly all of the loss. With 2 they hardly count, though all later attention leans on them. 1 is between, and ours.
    """
    size = x1.square().mean(dim=-1).sqrt()  # |x1|, (batch, seq)
    return (error.square().mean(dim=-1) / size**token_power).mean()


def flow_matching_loss(velocity, x0, x1, logits=None, time_power=1.0, token_power=0.0):
    """Flow matching (Eq. 3, Alg. 1): E‖u((1 − t) x0 + t x1, t) − (x1 − x0)‖², the straight path's own velocity.

    velocity: a function of (x, t). x0, x1: (batch, seq, hidden). logits: not used. Returns a number, by `mean_square`.
    time_power: t is uniform to this power; 1 is the paper's, above it early times come oftener, which is ours.
    """
    t = torch.rand(len(x0), 1, 1, device=x0.device) ** time_power  # one time for each sequence
    x_t = (1 - t) * x0 + t * x1
    return mean_square(velocity(x_t, t) - (x1 - x0), x1, token_power)


WARM_UP = 50  # steps
LOG_EVERY = 10  # steps
VALIDATION_TOKENS = 16_384


def one_or_more(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give 1 or more")
    return int(text)


def seed_number(text):
    if not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give 0 to 2147483647")
    return int(text)


def zero_or_more(text):
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give 0 or more")
    return float(text)


def above_zero(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give more than 0")
    return float(text)


def make_parser(description, method, start, end):
    """The options that both methods share, with the default span of one."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--start", type=int, default=start, help="first layer that is replaced (default %(default)s)")
    add("--end", type=int, default=end, help="first layer after the span, not replaced (default %(default)s)")
    add("--teacher", help=f"{TINY_TEACHER}, a folder, a .gguf file, or a model on the hub (default: EleutherAI/pythia-410m on a CUDA GPU, else {TINY_TEACHER})")
    add("--data", help="stdlib, a text file, a glob, or a data set (default: stdlib for tiny_teacher, else monology/pile-uncopyrighted)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--out", help=f"folder for the run (default runs/{method}-START-END)")
    add("--overwrite", action="store_true", help="replace the run that --out holds (default: refuse)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its own options; --max-steps may train it longer")
    add("--max-steps", type=one_or_more, default=2000, help="optimizer steps (default %(default)s)")
    add("--save-every", type=one_or_more, default=250, help="steps between checkpoints, each with a held-out score (default %(default)s)")
    add("--batch-size", type=one_or_more, default=8, help="sequences in a step, of all processes together (default %(default)s)")
    add("--accumulate", type=one_or_more, default=1, help="parts in which a process takes its sequences of a step, to save memory (default %(default)s)")
    add("--seq-len", type=one_or_more, help="tokens in a sequence (default: half the teacher's positions, at most 1024)")
    add("--lr", type=above_zero, default=1 / 64, help="learning rate, before warm-up and decay (default %(default)s)")
    add("--token-power", type=zero_or_more, default=1.0, help="each token's squared error is divided by its |x1| to this power: 0 is the paper's plain mean, 1 ours (default %(default)s)")
    add("--seed", type=seed_number, default=0, help="seed of the weights, the times and the order of local text (default %(default)s)")
    add("--init", default="first", help="where the velocity's weights start: first or middle layer of the span, a layer's number, or random (default %(default)s)")
    add("--compile", action="store_true", help="compile teacher and velocity with torch.compile (default: do not)")
    return parser


def parse_arguments(parser, method):
    """The options, and the checkpoint of the run that --resume names, or None.

    Beside --resume the run's own options are the defaults; only those that leave what is trained alone may differ.
    """
    args = parser.parse_args()
    if not args.resume:
        return args, None
    path = Path(args.resume) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["args"]
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {path}: give a folder that {Path(sys.argv[0]).name} wrote") from error
    except (*UNREADABLE, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged or no checkpoint: train anew ({first_line(error)})") from error
    if checkpoint["method"] != method:
        raise InputError(f"{args.resume} is a run of train_{checkpoint['method']}.py: resume it with that")
    parser.set_defaults(**saved)
    args = parser.parse_args()
    free = {"resume", "max_steps", "save_every", "device", "compile", "teacher"}
    changed = [name for name, value in vars(args).items() if name not in free and value != saved.get(name)]
    if changed:
        raise InputError(f"{args.resume} was trained with --{changed[0].replace('_', '-')} {saved.get(changed[0])}: leave that option out, or train anew if it is newer than the run")
    if args.max_steps <= checkpoint["step"]:
        raise InputError(f"{args.resume} is trained to step {checkpoint['step']}: give a larger --max-steps to train it longer")
    args.out = args.resume
    return args, checkpoint


def check_arguments(args, method, resumed, world_size):
    """Fill in the defaults that depend on the machine, and raise InputError for what cannot be; nothing is written yet."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.teacher = args.teacher or (TINY_TEACHER if args.device == "cpu" else "EleutherAI/pythia-410m")
    args.data = args.data or ("stdlib" if args.teacher == TINY_TEACHER else "monology/pile-uncopyrighted")
    args.out = args.out or f"runs/{method}-{args.start}-{args.end}"
    occupied = any((Path(args.out) / name).exists() for name in ("checkpoint.pt", "flow.safetensors"))
    if occupied and not (args.overwrite or resumed):
        raise InputError(f"{args.out} holds a run already: give another --out, --overwrite to replace it, or --resume {args.out}")
    if args.batch_size % (world_size * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} cannot be divided by {world_size} processes x --accumulate {args.accumulate}")


def fit_arguments(args, teacher):
    """Fill in the defaults that depend on the teacher; raises InputError if it has no such positions."""
    positions = teacher.config.max_position_embeddings
    args.seq_len = args.seq_len or min(1024, positions // 2)
    if not 2 <= args.seq_len <= positions:
        raise InputError(f"--seq-len {args.seq_len} does not fit this teacher: give 2 to {positions}, its number of positions")


def initialize(velocity, teacher, args):
    """Start the velocity's layer from the teacher's layer that --init names, or from random weights."""
    layers = backbone(teacher).layers
    named = {"first": layers[args.start], "middle": layers[(args.start + args.end) // 2]}
    named |= {str(number): layer for number, layer in enumerate(layers)}
    if args.init == "random":
        velocity.layer.apply(teacher._init_weights)
    elif args.init in named:
        velocity.layer.load_state_dict(named[args.init].state_dict())
    else:
        raise InputError(f"--init {args.init} is no layer: give first, middle, random or 0..{len(layers) - 1}")


def optimizers_of(velocity, lr):
    """Muon for the matrices of the velocity's layer, AdamW for the rest; Muon's steps are scaled so that one lr suits both."""
    matrices, others = [], []
    for name, weight in velocity.named_parameters():
        (matrices if weight.ndim == 2 and not name.startswith("time_mlp") else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def has_bfloat16(device):
    """Whether the hardware has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def autocast(device):
    """Matrix products in bfloat16, where that is fast; all else stays in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def say(text, rank):
    """Print a line above the first process' progress bar; training goes on where nobody reads it any more (`| head -1`)."""
    try:
        if rank == 0:
            tqdm.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


SIGNALS = []  # received


def finish_step(number, frame):
    """On Ctrl-C, or on a cluster's SIGTERM, let the loop finish its step and save it; a second one ends at once."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)


def restore(checkpoint, args, config, velocity, optimizers, text, rank, world_size):
    """Put back what a checkpoint holds; returns the steps done and the log. No random state is stored: each step seeds from its number."""
    if checkpoint["fingerprint"] != config.fingerprint:
        raise InputError(f"{args.out} was trained on another teacher than {args.teacher} as it is now: give that one by --teacher")
    if len(checkpoint["text"]) != world_size:
        raise InputError(f"{args.out} was trained by {len(checkpoint['text'])} processes, not {world_size}: resume it with as many")
    velocity.load_state_dict(checkpoint["velocity"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    text.load_state_dict(checkpoint["text"][rank])
    return checkpoint["step"], checkpoint["log"]


def write_log(folder, log):
    """Write the lines of the log."""
    write_whole(Path(folder) / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())


def save_run(folder, student, checkpoint):
    """Write the student's flow, the log, and all that training needs to go on in one file: each whole or not at all."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    save_flow(folder, student)
    write_log(folder, checkpoint["log"])
    write_whole(Path(folder) / "checkpoint.pt", content.getbuffer())


def prepare(model, device, compiled):
    """Make a frozen part of the teacher fast; its modules are its own, and the teacher's stay as they are."""
    for layer in backbone(model).layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and has_bfloat16(device):  # autocast would make the same bits anew at every step
                module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)
        if compiled:
            layer.forward = torch.compile(layer.forward)
    return model


def logits_after(head, x):
    """The logits that follow from the state x entering `end`. head: the teacher without the layers before `end`."""
    return head(inputs_embeds=x, use_cache=False).logits


def describe_tokens(x0, x1):
    """How unevenly a span moves its tokens, in words; x0, x1: (batch, seq, hidden)."""
    moved = (x1 - x0).float().square().sum(dim=-1).flatten()
    return f"{moved.max() / moved.median():,.1f} times the median's |x1 − x0|², and {moved.max() / moved.sum():.1%} of the sum"


def step_all(optimizers, lr):
    """Take a step with this learning rate, and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


def average(tensors, world_size):
    """Replace tensors by their means over all processes."""
    if world_size == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= world_size


def gather(state, world_size):
    """The states of all processes, a list."""
    states = [state] * world_size
    if world_size > 1:
        dist.all_gather_object(states, state)
    return states


def check_finite(step, out, **figures):
    """Raise InputError unless all figures are finite, so that no step is taken with what is not, and nothing saved from it."""
    if not all(map(math.isfinite, figures.values())):
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        raise InputError(f"step {step} gave {said}: lower --lr; {out} is as it was last saved")


def train(args, checkpoint, method, loss_of, solver, k):
    """Train a flow and save it: the loop of both methods.

    args, checkpoint: as from `parse_arguments`. loss_of: a function of (velocity, x0, x1, logits), where velocity is one of (x, t)
    and logits one of a state entering `end`. solver, k: how the flow is integrated when it is scored. Raises InputError.
    """
    # 1. Processes, teacher, text
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_arguments(args, method, checkpoint, world_size)
    device = pick_device(args.device)
    teacher, tokenizer = load_teacher(args.teacher, device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.compile and device.type == "cpu":
        teacher.set_attn_implementation("eager")  # plain operations, which the compiler fuses
    fit_arguments(args, teacher)
    text = training_rows(args.data, tokenizer, args.seq_len, args.seed, rank, world_size)
    validation, _ = held_out_rows(args.data, tokenizer, args.seq_len, VALIDATION_TOKENS)

    # 2. The student, whose velocity is trained; the frozen layers before and after it; where a resumed run goes on
    torch.manual_seed(args.seed)
    config = LFTConfig(teacher.config.to_dict(), args.start, args.end, solver, k, args.teacher, fingerprint(teacher))
    student = LFTForCausalLM(config, teacher).eval().to(device)
    velocity = student.flow.velocity
    initialize(velocity, teacher, args)
    optimizers, weights = optimizers_of(velocity, args.lr), list(velocity.parameters())
    done, log = restore(checkpoint, args, config, velocity, optimizers, text, rank, world_size) if checkpoint else (0, [])
    trunk = prepare(trunk_of(teacher, args.end), device, args.compile)
    head = prepare(replace_span(teacher, 0, args.end), device, args.compile)
    u = torch.compile(velocity) if args.compile else velocity

    # 3. The loop
    if rank == 0 and not (Path(args.out) / "log.jsonl").exists():
        write_log(args.out, log)  # to see now whether the folder can be written to
    span = f"layers {args.start}..{args.end - 1}, {args.end - args.start} of {teacher.config.num_hidden_layers}"
    say(f"teacher {args.teacher}, data {args.data}, on {device}: one flow replaces {span}", rank)
    with autocast(device):
        x0, x1, _ = hidden_pair(trunk, validation[:4].to(device), args.start)
    say(f"of {x0[..., 0].numel():,} held-out tokens the one that the span moves most has {describe_tokens(x0, x1)}", rank)
    say(f"mean_square divides each token's squared error by its |x1| to the power {args.token_power:g} (--token-power 0: the paper's plain mean)", rank)
    SIGNALS.clear()
    handlers = {number: signal.signal(number, finish_step) for number in (signal.SIGINT, signal.SIGTERM)}
    rows, tokens, losses = iter(text), args.batch_size * args.seq_len, []  # tokens of a step, losses since the last line of the log
    progress = tqdm(total=args.max_steps * tokens, initial=done * tokens, unit="tok", unit_scale=True, disable=rank > 0)
    clock = time.perf_counter()
    for step in range(done + 1, args.max_steps + 1):
        torch.manual_seed((args.seed << 32) + step * world_size + rank)  # so that there is no random state to save
        loss = torch.zeros((), device=device)
        for _ in range(args.accumulate):
            ids = torch.tensor([next(rows)["ids"] for _ in range(args.batch_size // (world_size * args.accumulate))]).to(device)
            with autocast(device):
                x0, x1, context = hidden_pair(trunk, ids, args.start)
                part = loss_of(functools.partial(u, **context), x0, x1, functools.partial(logits_after, head)) / args.accumulate
            part.backward()
            loss += part.detach()
        figures = torch.stack([loss, torch.full_like(loss, len(SIGNALS))])  # averaged as the gradients are, so that all decide alike
        average([figures, *(weight.grad for weight in weights if weight.grad is not None)], world_size)
        norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
        loss, stop = figures.tolist()  # stop is above 0 once any process was told to
        check_finite(step, args.out, loss=loss, gradient_norm=norm)
        lr = args.lr * min(1, step / WARM_UP) * (1 - (step - 1) / args.max_steps)  # straight down to 0, and less in the first steps
        step_all(optimizers, lr)
        losses.append(loss)
        saving = step % args.save_every == 0 or step == args.max_steps or stop
        if step % LOG_EVERY and not saving:
            continue

        line = {"step": step, "tokens": step * tokens, "loss": sum(losses) / len(losses), "lr": lr, "gradient_norm": norm,
                "tokens_per_second": round(len(losses) * tokens / (time.perf_counter() - clock))}  # fmt: skip
        progress.update(len(losses) * tokens)
        progress.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
        if saving:
            score = summarize(evaluate(teacher, {"student": student}, validation, args.end)["student"])
            check_finite(step, args.out, held_out_kl=score["kl"])
            line |= {"held_out_nmse": score["nmse"], "held_out_kl": score["kl"]}
        log.append(line)
        if saving:
            places = gather(text.state_dict(), world_size)  # one process, one place in the text
            config.training = vars(args) | {"method": method, "tokens": step * tokens}
            say(f"step {step}: held-out NMSE {score['nmse']:.4f}, KL {score['kl']:.4f} nats per token", rank)
            if rank == 0:
                save_run(args.out, student, {
                    "method": method, "args": vars(args), "fingerprint": config.fingerprint, "step": step, "log": log, "text": places,
                    "velocity": velocity.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                })  # fmt: skip
        if stop:
            break
        losses, clock = [], time.perf_counter()
    progress.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if world_size > 1:
        dist.destroy_process_group()
    say(f"{'interrupted; ' if stop else ''}saved in {args.out}: python eval_kl.py {args.out}", rank)


def main():
    parser = make_parser(__doc__.splitlines()[0], "fm", 6, 12)
    parser.add_argument("--time-power", type=above_zero, default=1.0, help="times are uniform draws to this power: 1 is the paper's, above it early times come oftener, ours (default %(default)s)")
    args, checkpoint = parse_arguments(parser, "fm")
    train(args, checkpoint, "fm", functools.partial(flow_matching_loss, time_power=args.time_power, token_power=args.token_power), solver="midpoint", k=1)


if __name__ == "__main__":
    run_script(main)
