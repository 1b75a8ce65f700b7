"""Train a velocity field by flow matching (Eq. 3, Alg. 1) to stand in for a span of a teacher's layers.

    python train_fm.py --start 6 --end 12              # one flow for layers 6..11
    python train_fm.py --resume runs/fm-6-12           # go on with a run that was stopped, as if it had not been
    torchrun --nproc_per_node 4 -- train_fm.py …       # on four GPUs

On a CUDA GPU the teacher is Pythia-410M and the text the Pile, streamed; on a machine without one, the embedded teacher
and the source of Python's standard library. The training loop below is also that of train_fw.py.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from eval_kl import evaluate, flow_row, kl_divergence, kl_text, log_probabilities, logits_of, skip_row, summarise
from lft import (
    FORMAT, TINY_TEACHER, FlowLayer, InputError, VelocityBlock, check_positive, check_seq_len, check_span, default_seq_len,
    describe_teacher, first_line, held_out_tokens, hidden_pair, layer_range, load_teacher, pick_device, run_layers, run_script,
    save_flow, token_batches, write_whole,
)  # fmt: skip


def flow_matching_loss(velocity, x0, x1, time_power=1.0, by_quarter=None):
    """Flow matching (Eq. 3, Alg. 1): the velocity on the straight path from x0 to x1 is to be x1 - x0.

    velocity: a function of (x, t). x0, x1: (batch, seq, hidden). Returns the mean square over all elements. time_power: 1 is
    the paper's uniform t; above 1, which is ours, early times come oftener. by_quarter: a tensor (2, 4) that gathers, for
    each quarter of the unit interval, the sum of the sequences' losses and their number.
    """
    t = torch.rand(len(x0), 1, 1, device=x0.device) ** time_power  # one time for each sequence
    x_t = (1 - t) * x0 + t * x1
    losses = (velocity(x_t, t) - (x1 - x0)).float().square().mean(dim=(1, 2))  # Eq. 3, (batch,)
    if by_quarter is not None:
        quarter = (4 * t.flatten()).long().clamp(max=3)  # a power below 1 may round t to 1
        by_quarter.index_add_(1, quarter, torch.stack([losses.detach(), torch.ones_like(losses)]))
    return losses.mean()


LR_TIMES_WIDTH = 2.0


def parse_arguments(description, method, start, end):
    """The options that both methods share, with the default span of one."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--start", type=int, default=start, help="first layer that is replaced (default %(default)s)")
    add("--end", type=int, default=end, help="first layer after the span, not replaced (default %(default)s)")
    add("--teacher", help=f"{TINY_TEACHER}, a folder, or a GPT-NeoX on the hub (default: EleutherAI/pythia-410m on a CUDA GPU, else {TINY_TEACHER})")
    add("--data", help="stdlib, a text file, a glob, or a data set, on the hub or in a folder (default: stdlib for tiny_teacher, else monology/pile-uncopyrighted)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--out", help=f"folder for the run (default runs/{method}-START-END)")
    add("--overwrite", action="store_true", help="replace the run that --out holds (default: refuse)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its own options (default: a new run)")
    add("--max-steps", type=int, default=2000, help="optimizer steps (default %(default)s)")
    add("--save-every", type=int, default=250, help="steps between checkpoints, each with a held-out score (default %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences in a step, of all GPUs together (default %(default)s)")
    add("--accumulate", type=int, default=1, help="parts in which a GPU takes its sequences of a step, to save memory (default %(default)s)")
    add("--seq-len", type=int, help="tokens in a sequence (default: half the teacher's positions)")
    add("--lr", type=float, help=f"peak learning rate (default: {LR_TIMES_WIDTH:g} / the teacher's width)")
    add("--seed", type=int, default=0, help="seed of the weights, the times and the order of local text (default %(default)s)")
    add("--init", default="first", help="where the velocity's weights start: middle or first layer of the span, a layer's number, or random (default %(default)s)")
    add("--compile", action="store_true", help="compile teacher and velocity with torch.compile (default: do not)")
    return parser


def read_arguments(parser, method):
    """The options of a new run and None, or the options and the checkpoint of the run that --resume names."""
    args = parser.parse_args()
    if args.resume is None:
        return args, None
    path = Path(args.resume) / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, and this code reads {FORMAT}")
    except OSError as error:
        raise InputError(f"no checkpoint at {path}: give a folder that {Path(sys.argv[0]).name} wrote") from error
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged, or no checkpoint of this version: train anew ({first_line(error)})") from error
    if saved["method"] != method:
        raise InputError(f"{args.resume} is a run of train_{saved['method']}.py: resume it with that")
    free = ("resume", "device", "compile")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name) and name not in free]
    if given:
        raise InputError(f"--resume goes on with the run's own options: leave out --{given[0].replace('_', '-')}")
    if saved["step"] >= saved["args"]["max_steps"]:
        raise InputError(f"{args.resume} is trained to its last step, {saved['step']}: nothing is left to resume")
    chosen = {name: getattr(args, name) or saved["args"][name] for name in free}
    return argparse.Namespace(**saved["args"] | chosen | {"out": args.resume}), saved


def init_layer(teacher, args):
    """The teacher layer that --init names, or None for random weights."""
    layers = teacher.gpt_neox.layers
    named = {"middle": layers[(args.start + args.end) // 2], "first": layers[args.start], "random": None}
    named |= {str(number): layer for number, layer in enumerate(layers)}
    if args.init not in named:
        raise InputError(f"--init {args.init} is no layer: give middle, first, random or 0..{len(layers) - 1}")
    return named[args.init]


def optimizers_of(velocity, lr):
    """Muon for the matrices of the velocity's layer, AdamW for the rest; Muon's steps are scaled so that one lr suits both."""
    matrices = [weight for weight in velocity.layer.parameters() if weight.ndim == 2]
    others = [weight for name, weight in velocity.named_parameters() if not name.startswith("layer.") or weight.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def autocast(device):
    """bfloat16 for the matrix products, where the hardware has instructions for it; otherwise nothing."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def join_processes(device):
    """The device, rank and number of processes: 0 and 1, unless torchrun started several."""
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def logit_kl(teacher, end, context, x1, x1_hat):
    """KL of the logits from the teacher's, where the state entering layer `end` is x1_hat instead of x1, in nats per token.

    x1, x1_hat: (batch, seq, hidden). The teacher's layers after the span run on both; the gradient is that of x1_hat.
    """

    def log_probabilities_after(x):
        return log_probabilities(logits_of(teacher, run_layers(teacher, x, end, teacher.config.num_hidden_layers, context)))

    with torch.no_grad():
        log_p = log_probabilities_after(x1)
    return kl_divergence(log_p, log_probabilities_after(x1_hat)).mean()


class Objective(nn.Module):
    """The loss as a module, of (x0, x1, context), which is what DistributedDataParallel averages the gradients of.

    logit_kl: for a loss that wants it, the function of (context, x1, x1_hat) that gives the KL of the logits.
    """

    def __init__(self, velocity, loss_of, device, logit_kl=None):
        super().__init__()
        self.velocity, self.loss_of, self.logit_kl = velocity, loss_of, logit_kl
        self.by_quarter = torch.zeros(2, 4, device=device)

    def forward(self, x0, x1, context):
        more = {"logit_kl": functools.partial(self.logit_kl, context)} if self.logit_kl else {}
        return self.loss_of(functools.partial(self.velocity, **context), x0, x1, by_quarter=self.by_quarter, **more)


# Matrix products in bfloat16, operations per second, by the vendor's data sheet.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}


def peak_of(device):
    """The peak of this GPU, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK.items() if gpu in name), None)


def operations(teacher, objective, args):
    """Floating-point operations of a training step on one token, counted on one sequence; attention as if it had no mask."""
    ids = torch.zeros(1, args.seq_len, dtype=torch.long, device=teacher.device)
    with torch.random.fork_rng([ids.device] if ids.is_cuda else []), FlopCounterMode(display=False) as counter, autocast(teacher.device):
        objective(*hidden_pair(teacher, ids, args.start, args.end)).backward()
    objective.zero_grad()
    objective.by_quarter.zero_()
    return counter.get_total_flops() / args.seq_len


def peak_memory(device):
    """The most memory that this process has held, in GiB: of the GPU since the last score, or without one the resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def cut_log(path, step):
    """Drop what was logged after a step, which a resumed run does again, and a last line that was not written whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    write_whole(path, lambda part: part.write_text("".join(kept)))


LOG_EVERY = 10  # steps: what is on the device is read then, and only then, so that the device never waits for us
WARM_UP = 50  # steps


def train(args, saved, method, loss_of, solver, steps, notes=None, wants_logits=False):
    """Train a flow and save it: the loop of both methods.

    args, saved: as from `read_arguments`. loss_of: the loss, a function of (velocity, x0, x1, by_quarter). solver, steps:
    how the flow is integrated when it is evaluated. notes: what flow.json is to say of the method's own options.
    wants_logits: whether loss_of also takes `logit_kl`, a function of x1 and its estimate. Raises InputError before anything is
    written, and if a file cannot be written.
    """
    check_positive(args, "max_steps", "save_every", "batch_size", "accumulate", "seq_len", "lr")
    device, rank, processes = join_processes(pick_device(args.device))
    args.teacher = args.teacher or ("EleutherAI/pythia-410m" if device.type == "cuda" else TINY_TEACHER)
    args.data = args.data or ("stdlib" if args.teacher == TINY_TEACHER else "monology/pile-uncopyrighted")
    args.out = args.out or f"runs/{method}-{args.start}-{args.end}"
    out = Path(args.out)
    occupied = any((out / name).exists() for name in ("flow.json", "flow.safetensors", "checkpoint.pt"))
    if occupied and not (args.overwrite or saved):
        raise InputError(f"{out} holds a run already: give another --out, --overwrite to replace it, or --resume {out}")
    if args.batch_size % (processes * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} cannot be cut evenly for {processes} x {args.accumulate}, the processes times --accumulate")
    args.device = args.device or device.type
    teacher, tokenizer = load_teacher(args.teacher, device)
    check_span(teacher, args.start, args.end)
    args.seq_len = args.seq_len or default_seq_len(teacher)
    check_seq_len(teacher, args.seq_len)
    args.lr = args.lr or LR_TIMES_WIDTH / teacher.config.hidden_size
    teacher_is = describe_teacher(teacher)
    if saved and (saved["teacher_is"] != teacher_is or len(saved["processes"]) != processes):
        raise InputError(
            f"{out} cannot be resumed here: it needs the teacher {args.teacher} as it was, and {len(saved['processes'])} processes"
        )
    # The velocity, and the text.
    torch.manual_seed(args.seed)
    velocity = VelocityBlock(teacher.config, init_layer(teacher, args)).to(device)
    validation = held_out_tokens(args.data, tokenizer, args.seq_len)
    here = saved["processes"][rank] if saved else {"text": {}}  # what each process has of its own
    batches = token_batches(
        args.data, tokenizer, args.batch_size // processes, args.seq_len, args.seed, here["text"], rank, processes
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made a folder ({error.strerror}): give another") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out} cannot be written to: give another")

    # The optimizers and their schedule; where a resumed run goes on.
    optimizers = optimizers_of(velocity, args.lr)

    def lr_factor(step):  # straight down to 0 at the last step, times a linear warm-up
        return min(1, (step + 1) / WARM_UP) * (1 - step / args.max_steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor) for optimizer in optimizers]
    steppers = {"muon": optimizers[0], "adamw": optimizers[1], "muon_schedule": schedules[0], "adamw_schedule": schedules[1]}
    done = 0
    if saved:
        velocity.load_state_dict(saved["velocity"])
        for name, stepper in steppers.items():
            stepper.load_state_dict(saved[name])
        done = saved["step"]
        torch.set_rng_state(here["rng"])
        if device.type == "cuda" and "cuda_rng" in here:  # a run that moves over from a CPU has none
            torch.cuda.set_rng_state(here["cuda_rng"], device)
    elif rank:
        torch.manual_seed(args.seed + rank)  # each process draws times of its own

    # What the device runs.
    if args.compile and device.type == "cpu":
        teacher.set_attn_implementation("eager")  # plain operations, which the compiler fuses; the velocity shares the setting
    maybe_compiled = torch.compile if args.compile else lambda function: function

    def objective_of(velocity, logit_kl):
        return Objective(velocity, loss_of, device, functools.partial(logit_kl, teacher, args.end) if wants_logits else None)

    pair_of, objective = maybe_compiled(hidden_pair), objective_of(maybe_compiled(velocity), maybe_compiled(logit_kl))
    peak = peak_of(device)
    operations_per_token = operations(teacher, objective_of(velocity, logit_kl), args) if peak else None
    parallel = DistributedDataParallel(objective) if processes > 1 else objective

    # How the flow is scored and saved.
    student = flow_row(FlowLayer(velocity, args.start, args.end, solver, steps))
    dropped = skip_row(args.start, args.end - args.start, args.end)

    def score(row):
        velocity.eval()
        summary = summarise(evaluate(teacher, validation, args.end, {"row": row})["row"])
        velocity.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return summary

    def text_of(summary):
        return f"NMSE {summary['nmse']:.4f}, KL {kl_text(summary)}"

    def of_all_processes():
        mine = {"text": here["text"], "rng": torch.get_rng_state()}
        if device.type == "cuda":
            mine["cuda_rng"] = torch.cuda.get_rng_state(device)
        states = [mine] * processes
        if processes > 1:
            dist.all_gather_object(states, mine)
        return states

    def save_checkpoint():  # all that training needs to go on, in one file, and the flow
        states = of_all_processes()
        if rank == 0:
            checkpoint = {
                "format": FORMAT, "method": method, "args": vars(args), "teacher_is": teacher_is, "step": done,
                "velocity": velocity.state_dict(), "processes": states, **{name: stepper.state_dict() for name, stepper in steppers.items()},
            }  # fmt: skip
            write_whole(out / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
            save()

    def save():
        save_flow(out, velocity, {
            "method": method, "teacher": args.teacher, "teacher_is": teacher_is, "data": args.data, "start": args.start,
            "end": args.end, "solver": solver, "steps": steps, **(notes or {}), "init": args.init, "lr": args.lr,
            "batch_size": args.batch_size, "seq_len": args.seq_len, "max_steps": args.max_steps, "seed": args.seed,
            "trained_steps": done, "trained_tokens": done * tokens_per_step,
        })  # fmt: skip

    # The loop.
    tokens_per_step = args.batch_size * args.seq_len
    layers = f"layers {layer_range(args.start, args.end)}, {args.end - args.start} of {teacher.config.num_hidden_layers}"
    if rank == 0:
        print(f"teacher {args.teacher}, data {args.data}, on {device}: one flow replaces {layers}", flush=True)
    if saved and rank == 0:
        cut_log(out / "log.jsonl", done)
    begun, stopped, spoilt, interrupted, log = done, None, False, [], None
    window = []  # loss and gradient norm of each step since the last line of the log
    unwritten = []  # lines of the log
    weights = list(velocity.parameters())
    good = [weight.detach().clone() for weight in weights]  # the last weights that gave a finite loss and gradient
    finite = torch.ones((), dtype=torch.bool, device=device)

    def interrupt(number, frame):  # the step under way is finished and saved; a second Ctrl-C ends at once
        interrupted.append(number)
        signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    progress = tqdm(total=args.max_steps * tokens_per_step, initial=done * tokens_per_step, unit="tok", unit_scale=True, disable=rank > 0)
    clock = time.perf_counter()
    try:
        for ids in itertools.islice(batches, args.max_steps - done):
            if device.type == "cuda":
                ids = ids.pin_memory().to(device, non_blocking=True)
            loss = torch.zeros((), device=device)
            for number, part in enumerate(ids.chunk(args.accumulate), 1):
                # Several processes average their gradients once a step, in the last part's backward pass.
                alone = processes > 1 and number < args.accumulate
                with parallel.no_sync() if alone else contextlib.nullcontext():
                    with autocast(device):
                        part_loss = parallel(*pair_of(teacher, part, args.start, args.end)) / args.accumulate
                    part_loss.backward()
                loss += part_loss.detach()
            norm = nn.utils.clip_grad_norm_(weights, 1.0)
            finite &= norm.isfinite()
            with torch.no_grad():
                for kept, weight in zip(good, weights):
                    kept.copy_(torch.where(finite, weight, kept))
            for stepper in steppers.values():
                stepper.step()
            objective.zero_grad()
            window.append(torch.stack([loss, norm]))
            done += 1
            saving = done % args.save_every == 0 or done == args.max_steps
            if done % LOG_EVERY and not saving and not (interrupted and processes == 1):
                continue

            # Now and then the device is waited for: is all well, what is to be told and saved, and is it time to stop?
            figures, by_quarter = torch.stack(window), objective.by_quarter.clone()
            if processes > 1:
                dist.all_reduce(figures)
                dist.all_reduce(by_quarter)
            figures = (figures / processes).tolist()
            window.clear()
            objective.by_quarter.zero_()
            first = done - len(figures) + 1
            bad = next((n for n, (_, norm) in enumerate(figures) if not math.isfinite(norm)), None)
            if bad is not None:  # the update before that step spoilt the weights
                loss, norm = figures[bad]
                stopped = f"the loss of step {first + bad} is {loss} and its gradient's norm {norm}: try a lower --lr"
                spoilt, done = True, first + bad - 2
            elif rank == 0:
                speed = len(figures) * tokens_per_step / (time.perf_counter() - clock)
                line = {
                    "step": done, "tokens": done * tokens_per_step, "loss": sum(loss for loss, _ in figures) / len(figures),
                    "lr": args.lr * lr_factor(done - 1), "gradient_norm": figures[-1][1], "tokens_per_second": round(speed),
                    "peak_memory_gib": round(peak_memory(device), 2),
                }  # fmt: skip
                if peak:
                    line["mfu"] = speed / processes * operations_per_token / peak
                if by_quarter[1].all():
                    line["loss_by_quarter_of_t"] = (by_quarter[0] / by_quarter[1]).tolist()
                progress.update(len(figures) * tokens_per_step)
                progress.set_postfix(loss=f"{line['loss']:.4f}", **({"mfu": f"{line['mfu']:.0%}"} if peak else {}), refresh=False)
                if saving:
                    summary = score(student)
                    line |= {"held_out_nmse": summary["nmse"], "held_out_kl": summary["kl"]}
                    progress.write(f"step {done}: held-out {text_of(summary)}")
                    if not math.isfinite(summary["kl"]):
                        stopped, spoilt = f"the held-out KL after step {done} is {summary['kl']}: try a lower --lr", True
                        done -= 1
                unwritten.append(json.dumps(line))
                if saving or interrupted or saved or not occupied:  # a run that is overwritten keeps its log as long as its checkpoint
                    log = log or open(out / "log.jsonl", "a" if saved else "w", buffering=1)
                    print(*unwritten, sep="\n", file=log)
                    unwritten.clear()
            if processes > 1:  # the first decides for all
                decision = [stopped, interrupted]
                dist.broadcast_object_list(decision)
                stopped, interrupted = decision
            if stopped:
                break
            if saving or interrupted:
                save_checkpoint()
            if interrupted:
                stopped = "interrupted"
                break
            clock = time.perf_counter()
    except InputError as error:  # no more text, or no more room
        if processes > 1 or done == begun or not finite:
            raise
        save_checkpoint()
        stopped = str(error)
    except OSError as error:  # of the log
        raise InputError(f"{out} cannot be written to ({error.strerror}): make room, then --resume {out}") from error
    except torch.OutOfMemoryError as error:
        raise InputError(f"the memory of {device} does not hold a step: raise --accumulate, or lower --batch-size") from error
    finally:
        progress.close()
        if log:
            with contextlib.suppress(OSError):  # of a full disk, which has been said
                log.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if processes > 1:
        del parallel  # before the process group that it uses: the other way round it can hang
        dist.destroy_process_group()
    if rank > 0:
        return
    if spoilt:  # take the last update back, and keep the rest, unless there is none
        if done < begun or done == 0 and occupied:
            sys.exit(f"{stopped}; nothing was saved")
        with torch.no_grad():
            for kept, weight in zip(good, weights):
                weight.copy_(kept)
        save()
        if occupied and not saved and not log:
            (out / "checkpoint.pt").unlink(missing_ok=True)  # of the run that was overwritten
    if stopped:
        sys.exit(f"{stopped}; {out} holds the flow of step {done}")
    print("held-out text for validation, KL in nats per token, lower is better")
    print(f"  student       {text_of(summary)}\n  span dropped  {text_of(score(dropped))}")
    print(f"saved in {out}: python eval_kl.py {out}")


def main():
    parser = parse_arguments(__doc__.splitlines()[0], "fm", 6, 12)
    parser.add_argument("--time-power", type=float, default=3.0, help="times are uniform draws to this power: 1 is the paper's, above it early times come oftener, ours (default %(default)s)")
    args, saved = read_arguments(parser, "fm")
    if not 0 < args.time_power < math.inf:
        raise InputError(f"--time-power {args.time_power} is no power: give more than 0")
    loss_of = functools.partial(flow_matching_loss, time_power=args.time_power)
    train(args, saved, "fm", loss_of, solver="midpoint", steps=1, notes={"time_power": args.time_power})


if __name__ == "__main__":
    run_script(main)
