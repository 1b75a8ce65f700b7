"""Train a velocity field by flow matching (Eq. 3, Alg. 1) to replace a span of a teacher's layers.

    python train_fm.py --start 6 --end 12               # layers 6..11
    python train_fm.py --start 6 --end 12 --resume      # continue where that run stopped
    torchrun --nproc_per_node 4 -- train_fm.py --start 6 --end 12

With a GPU the teacher is Pythia-410M and the text the Pile, streamed. Without one they are the included tiny_teacher and the
source of Python's standard library. train_fw.py uses the same loop with another loss.
"""
import argparse
import functools
import io
import json
import math
import os
import signal
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import PILE, held_out_rows, take, training_rows
from eval_kl import DEVICES, TOKEN_POWER, VALIDATION_TOKENS, evaluate, origins, token_errors
from lft import InputError, LFTConfig, LFTForCausalLM, check_layers, check_span, hidden_pair, load_teacher, replace_span
from lft import run_script, trunk_of


# ---- 1. The loss
def flow_matching_loss(velocity, x0, x1, logits=None, token_power=TOKEN_POWER):
    """E‖u((1 - t) x0 + t x1, t) - (x1 - x0)‖² (Eq. 3): at a random point of the straight path, predict the path's velocity.

    velocity: a function of (x, t). x0, x1: (batch, seq, hidden). logits: not used. Returns the mean of `token_errors`, a scalar.
    """
    t = torch.rand(len(x0), 1, 1, device=x0.device)  # one time per sequence
    x_t = (1 - t) * x0 + t * x1
    return token_errors(velocity(x_t, t) - (x1 - x0), x1, token_power).mean()


# ---- 2. The options
def make_parser(doc, method, start, end, init="first"):
    """The options of every training script, with the defaults of its method."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.set_defaults(method=method)
    add = parser.add_argument
    add("--start", type=int, default=start, help="first layer to replace (default: %(default)s)")
    add("--end", type=int, default=end, help="first layer to keep after the span (default: %(default)s)")
    add("--teacher", help="a folder or a model on the hub (default: EleutherAI/pythia-410m with a GPU, else tiny_teacher)")
    add("--data", nargs="+", help="stdlib, files, folders, globs or hub data sets (default: the Pile; stdlib for tiny_teacher)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to train (default: %(default)s)")
    add("--out", help=f"folder of the run (default: runs/{method}-START-END)")
    add("--resume", action="store_true", help="continue the run in --out: repeat its options; a larger --max-steps trains on")
    add("--max-steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    add("--save-every", type=int, default=250, help="steps between checkpoints and validation scores (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences per step, over all processes (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="micro-batches per step and process (default: %(default)s)")
    add("--seq-len", type=int, help="tokens per sequence (default: half the teacher's positions, at most 1024)")
    add("--lr", type=float, default=1 / 64, help="learning rate (default: 1/64)")
    add("--init", default=init, help="layer to start from: first or middle of the span, or a number (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights, the times and the order of plain text (default: %(default)s)")
    add("--compile", action="store_true", help="compile velocity and teacher; on a CPU this needs a C++ compiler")
    return parser


# ---- 3. The student and its optimizers
def make_student(args, solver, k, world_size):
    """Fill in the options that depend on others; returns teacher, tokenizer and a student to train. Raises InputError."""
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # each process of torchrun has a GPU of its own
    args.teacher = args.teacher or ("tiny_teacher" if args.device == "cpu" else "EleutherAI/pythia-410m")
    args.data = args.data or (["stdlib"] if args.teacher == "tiny_teacher" else [PILE])
    args.out = args.out or f"runs/{args.method}-{args.start}-{args.end}"
    teacher, tokenizer = load_teacher(args.teacher, args.device)
    check_span(teacher, args.start, args.end)
    init = int({"first": args.start, "middle": (args.start + args.end) // 2}.get(args.init, args.init))
    check_layers(teacher, [*range(args.start, args.end), init])
    positions = teacher.config.max_position_embeddings
    args.seq_len = args.seq_len or min(1024, positions // 2)
    if args.seq_len > positions or args.batch_size % (world_size * args.accumulate):
        raise InputError(f"give --seq-len up to {positions}, --batch-size in multiples of {world_size} processes x --accumulate")
    if args.compile and args.device == "cpu":
        teacher.set_attn_implementation("eager")  # plain operations, which the compiler fuses
    torch.manual_seed(args.seed)
    student = LFTForCausalLM(LFTConfig(teacher.config.to_dict(), args.start, args.end, solver, k, args.teacher), teacher)
    student.flow.velocity.load_state_dict(student.velocity_class(teacher.get_decoder().layers[init]).state_dict())
    return teacher, tokenizer, student.eval().to(teacher.device)


def make_optimizers(velocity):
    """Muon for the block's matrices, AdamW for the rest; Muon's updates are scaled so that one learning rate suits both.

    Only matrices decay. Norms, biases and gates have small gradients, and over a long run decay would shrink them to nothing.
    """
    groups = {"muon": [], "matrices": [], "vectors": []}
    for name, weight in velocity.named_parameters():
        kind = "vectors" if weight.ndim < 2 else "muon" if weight.ndim == 2 and "time_mlp" not in name else "matrices"
        groups[kind].append(weight)
    adamw = [{"params": groups["matrices"], "weight_decay": 0.01}, {"params": groups["vectors"], "weight_decay": 0.0}]
    return [
        torch.optim.Muon(groups["muon"], momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True),
    ]


WARM_UP = 0.025  # of the run


def learning_rate(step, args):
    """Linear warm-up times linear decay to 0; the first step is 1."""
    return args.lr * min(1, step / (WARM_UP * args.max_steps)) * (1 - (step - 1) / args.max_steps)


def autocast(device):
    """Mixed precision, where CUDA or the CPU can multiply bfloat16 matrices; weights and the residual stream are in float32."""
    cpu = torch.cpu.get_capabilities()
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(fast) and device.type in ("cuda", "cpu"))


# ---- 4. The run's folder
MAY_CHANGE = {"resume", "max_steps", "save_every", "device", "compile", "teacher", "out"}  # when a run is resumed


def open_run(args, **made_from):
    """Claim the folder of a new run, or read the checkpoint of the one to resume. Raises InputError.

    Returns the log, the checkpoint or None, and all options that must not change: those of the command and made_from.
    """
    log = Path(args.out) / "log.jsonl"
    options = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE} | made_from
    if not args.resume:
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            return open(log, "x"), None, options  # fails for one of two runs that start together
        except FileExistsError:
            raise InputError(f"{args.out} holds a run: add --resume to continue it, delete it, or give another --out") from None
    try:
        checkpoint = torch.load(Path(args.out) / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is missing, corrupt or in the wrong format
        raise InputError(f"{args.out} has no usable checkpoint: delete it, and start without --resume") from error
    for name, was in checkpoint["options"].items():
        if options.get(name) != was:
            raise InputError(f"{args.out} was trained with {name} {was}, not {options.get(name)}: give the same again")
    if args.max_steps < checkpoint["max_steps"]:
        raise InputError(f"{args.out} was trained with --max-steps {checkpoint['max_steps']}: give as many or more")
    log.write_text(checkpoint["log"])  # without the lines that came after the checkpoint
    return open(log, "a"), checkpoint, options


def save_checkpoint(folder, **state):
    """Write the checkpoint atomically: a run that is killed at any moment keeps its last one."""
    content, part = io.BytesIO(), Path(folder) / "checkpoint.part"
    torch.save(state, content)  # in memory: on a full disk, torch.save to a file raises no OSError
    part.write_bytes(content.getbuffer())
    os.replace(part, Path(folder) / "checkpoint.pt")


# ---- 5. The loop
def check_finite(out, step, **figures):
    """Stop on a NaN or infinite value, before it is used or saved."""
    if not all(map(math.isfinite, figures.values())):
        raise InputError(f"step {step} gave {figures}: start again with a lower --lr and another --out")


def train(args, loss_of, solver, k):
    """Train a flow; write the student (a transformers model), checkpoint.pt and log.jsonl to args.out.

    loss_of: a function of (velocity, x0, x1, logits) that returns a scalar; logits maps a state entering layer `end` to logits.
    solver, k: how the flow is integrated when it is scored and used.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    teacher, tokenizer, student = make_student(args, solver, k, world_size)
    device, velocity = teacher.device, student.flow.velocity
    optimizers, weights = make_optimizers(velocity), list(velocity.parameters())
    trunk, head = trunk_of(teacher, args.end), replace_span(teacher, 0, args.end)  # the frozen layers before and after the flow
    logits = lambda x: head(inputs_embeds=x, use_cache=False).logits
    u = torch.compile(velocity) if args.compile else velocity
    for frozen in (*trunk.layers, *head.get_decoder().layers) if args.compile else ():
        frozen.forward = torch.compile(frozen.forward)
    if rank == 0:
        print(f"{args.teacher} on {device}: a flow replaces layers {args.start}..{args.end - 1}; reading", *args.data, flush=True)
    stream = training_rows(args.data, tokenizer, args.seq_len, args.seed, rank, world_size)
    validation, _ = held_out_rows(args.data, tokenizer, args.seq_len, VALIDATION_TOKENS)
    made_from = origins(teacher, validation) | {"world_size": world_size}
    log, checkpoint, options = open_run(args, **made_from) if rank == 0 or args.resume else (None, None, None)
    step, lines = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, "")
    if checkpoint:
        stream.load_state_dict(checkpoint["text"][rank])
        for part, state in zip((velocity, *optimizers), checkpoint["trained"]):
            part.load_state_dict(state)
    if rank == 0:
        with tempfile.TemporaryDirectory(dir=args.out) as trial:  # a student that cannot be saved fails now, not at the end
            student.save_pretrained(trial, save_original_format=False)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stopping = []  # Ctrl-C, or SIGTERM from a cluster, lets the step finish and saves; the same signal again ends at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stopping.append(number), signal.signal(number, signal.SIG_DFL)))
    rows, tokens, losses, clock, stop = iter(stream), args.batch_size * args.seq_len, [], time.perf_counter(), False
    for step in tqdm(range(step + 1, args.max_steps + 1), initial=step, total=args.max_steps, unit="step", disable=rank > 0):
        # Seeded by the step: no random state to save. The factor spreads seeds over the 32 bits that CPU generators keep.
        torch.manual_seed((args.seed * 2_654_435_761 + step * world_size + rank) % 2**32)
        sums = torch.zeros(2, device=device)  # the loss, and signals received
        for _ in range(args.accumulate):
            ids = take(rows, args.batch_size // (world_size * args.accumulate)).to(device)
            with autocast(device):
                x0, x1, context = hidden_pair(trunk, ids, args.start)
                loss = loss_of(functools.partial(u, **context), x0, x1, logits) / args.accumulate
            loss.backward()
            sums[0] += loss.detach()
        sums[1] = len(stopping)
        for tensor in (sums, *(weight.grad for weight in weights)) if world_size > 1 else ():
            dist.all_reduce(tensor)
            tensor /= world_size
        norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
        loss, stop = sums.tolist()
        check_finite(args.out, step, loss=loss, gradient_norm=norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
        saving = step % args.save_every == 0 or step == args.max_steps or stop
        if step % 10 and not saving:
            continue
        speed = len(losses) * tokens / (time.perf_counter() - clock)
        line = {"step": step, "tokens": step * tokens, "loss": sum(losses) / len(losses), "gradient_norm": norm,
                "lr": learning_rate(step, args), "tokens_per_second": round(speed)}  # fmt: skip
        if saving:
            score = evaluate(teacher, {"student": student}, validation, args.start, args.end)["student"]
            line |= {"held_out_nmse": score["nmse"].mean().item(), "held_out_kl": score["kl"].mean().item()}
            check_finite(args.out, step, held_out_kl=line["held_out_kl"])
            places = [stream.state_dict()] * world_size
            if world_size > 1:
                dist.all_gather_object(places, places[rank])
        lines += json.dumps(line) + "\n"
        if rank == 0 and saving:  # saved first, printed after: a closed pipe loses nothing
            state = {"options": options, "max_steps": args.max_steps, "step": step, "log": lines, "text": places}
            save_checkpoint(args.out, **state, trained=[part.state_dict() for part in (velocity, *optimizers)])
            tqdm.write(f"step {step}: validation KL {line['held_out_kl']:.4f} nats per token")
        if rank == 0:
            print(json.dumps(line), file=log, flush=True)
        if stop:
            break
        losses, clock = [], time.perf_counter()
    if rank == 0:
        student.config.training = vars(args) | options | {"tokens": step * tokens}
        (Path(args.out) / "model.safetensors").unlink(missing_ok=True)  # so that an interrupted save leaves no stale model
        student.save_pretrained(args.out, save_original_format=False)
        tokenizer.save_pretrained(args.out)
        print(f"saved in {args.out}: python eval_kl.py {args.out}")
    if world_size > 1:
        dist.destroy_process_group()


def main():
    parser = make_parser(__doc__, "fm", start=6, end=12)
    add = parser.add_argument
    add("--token-power", type=float, default=TOKEN_POWER, help="divide a token's error by RMS(x1) to this power (default: 1)")
    args = parser.parse_args()
    train(args, functools.partial(flow_matching_loss, token_power=args.token_power), solver="midpoint", k=1)


if __name__ == "__main__":
    run_script(main)
