"""The loop that all training scripts share: options, student, optimizers, steps.

A training script gives `train` its loss. With a GPU the teacher is Pythia-410M and the text the Pile, streamed. Without
one they are the included tiny_teacher and the source of Python's standard library.
"""

import argparse
import functools
from types import SimpleNamespace

import torch
from torch import nn

from data import PILE, held_out_windows, take, training_windows
from eval_kl import VALIDATION_TOKENS, evaluate
from lft import InputError, LFTForCausalLM, hidden_pair, replace_span, trunk_of
from run import (
    DEVICES,
    RANK,
    WORLD_SIZE,
    Run,
    average_over_processes,
    check_finite,
    hashes,
    load_teacher,
    start_processes,
    stop_signals,
)


# ---- 1. The options
def at_least_1(text):
    """The type of options that count something; argparse turns the error into a sentence."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def make_parser(doc, method, start, end):
    """The options of every training script, with the defaults of its method."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.set_defaults(method=method)
    add = parser.add_argument
    # fmt: off
    add("--start", type=int, default=start, help="first layer to replace (default: %(default)s)")
    add("--end", type=int, default=end, help="first layer to keep after the span (default: %(default)s)")
    add("--teacher", help="folder, model on the hub (default: EleutherAI/pythia-410m with a GPU, else tiny_teacher)")
    add("--data", nargs="+", help="stdlib, files, folders, hub data sets (default: Pile; stdlib for tiny_teacher)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to train (default: %(default)s)")
    add("--out", help=f"folder of the run (default: runs/{method}-START-END)")
    add("--resume", action="store_true", help="continue the run in --out, if there is one; repeat its options")
    add("--max-steps", type=at_least_1, default=2000, help="optimizer steps; set the schedule (default: %(default)s)")
    add("--save-every", type=at_least_1, default=250, help="steps from checkpoint to checkpoint (default: %(default)s)")
    add("--batch-size", type=at_least_1, default=8, help="sequences per step, of all processes (default: %(default)s)")
    add("--accumulate", type=at_least_1, default=1, help="micro-batches per step and process (default: %(default)s)")
    add("--seq-len", type=at_least_1, help="tokens per sequence (default: half the teacher's positions, at most 1024)")
    add("--lr", type=float, default=1 / 64, help="learning rate, before warm-up and decay (default: 1/64)")
    add("--init", default="middle", help="layer to copy: first or middle (of the span), a number (default: middle)")
    add("--seed", type=int, default=0, help="seed of weights, times, order of plain text (default: %(default)s)")
    add("--compile", action="store_true", help="compile velocity and teacher; on a CPU this needs a C++ compiler")
    # fmt: on
    return parser


def fill_in(args):
    """Set the options whose defaults depend on other options."""
    if args.teacher is None:
        args.teacher = "tiny_teacher" if args.device == "cpu" else "EleutherAI/pythia-410m"
    if args.data is None:
        args.data = ["stdlib"] if args.teacher == "tiny_teacher" else [PILE]
    if args.out is None:
        args.out = f"runs/{args.method}-{args.start}-{args.end}"


def fit_to_teacher(args, teacher):
    """Set the options whose defaults depend on the teacher; raise InputError for those that do not fit it."""
    replace_span(teacher, args.start, args.end)  # raises for a span that does not fit
    n = len(teacher.get_decoder().layers)
    names = {"first": args.start, "middle": (args.start + args.end) // 2}
    positions = teacher.config.max_position_embeddings
    init = str(names.get(args.init, args.init))
    if init not in map(str, range(n)):
        raise InputError(f"--init {args.init} is not a layer: give first, middle or a number from 0 to {n - 1}")
    args.init = int(init)
    if args.seq_len is None:
        args.seq_len = min(1024, positions // 2)
    if args.seq_len > positions:
        raise InputError(f"--seq-len {args.seq_len} is more than the teacher's {positions} positions")
    if args.batch_size % (WORLD_SIZE * args.accumulate):
        raise InputError(f"--batch-size must be a multiple of {WORLD_SIZE} processes x --accumulate")


# ---- 2. The student and its optimizers
@torch.no_grad()
def check_layers(teacher, numbers, velocity_class):
    """Raise InputError unless x + u(x, t), with u a new velocity, equals the output of each of these layers."""
    ids = torch.arange(8, device=teacher.device)[None]
    for number in numbers:
        message = f"{velocity_class.__name__} does not fit layer {number} of this {teacher.config.model_type}"
        try:
            x0, x1, context = hidden_pair(trunk_of(teacher, number + 1), ids, number)
            velocity = velocity_class(teacher.get_decoder().layers[number])
            error = (x0 + velocity(x0, 0.0, **context) - x1).norm() / (x1 - x0).norm()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, RuntimeError, TypeError) as cause:  # other parts or shapes, or called in another way
            raise InputError(message) from cause
        if not error < 1e-3:  # float32 rounding gives 1e-7, and 3e-5 in SmolLM2, whose states are large
            raise InputError(f"{message}: it misses {error:.2g} of the layer's update")


def make_student(teacher, args, solver, k, student_class):
    """A student whose velocity starts as a copy of one of the teacher's layers.

    Raises InputError if the layers do not fit.
    """
    check_layers(teacher, [*range(args.start, args.end), args.init], student_class.block_class)
    torch.manual_seed(args.seed)
    config = student_class.config_class(
        teacher=args.teacher,
        teacher_config=teacher.config.to_dict(),
        start=args.start,
        end=args.end,
        init=args.init,
        solver=solver,
        k=k,
    )
    return student_class(config, teacher).eval().to(teacher.device)


def make_optimizers(velocity):
    """Muon for the matrices of attention and MLP; AdamW for biases, norms and what is named modulation.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate suits both. In short runs twice the
    default of 1/64 and a quarter of it gave a higher KL. Only matrices decay: over a long run decay would pull the
    norms' gains to 0. Muon takes only matrices, experts are stacks of them.
    """
    muon = []
    decayed = []
    not_decayed = []
    for name, weight in velocity.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.ndim < 2:
            not_decayed.append(weight)
        elif weight.ndim > 2 or "modulation" in name:
            decayed.append(weight)
        else:
            muon.append(weight)
    adamw = [{"params": decayed, "weight_decay": 0.01}, {"params": not_decayed, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True),
    ]


WARM_UP = 0.025  # fraction of the steps: 50 of 2,000, more than the 20 over which AdamW averages (1 / (1 - 0.95))


def learning_rate(step, args):
    """Linear warm-up times linear decay to 0. Steps count from 1."""
    return args.lr * min(1, step / (WARM_UP * args.max_steps)) * (1 - (step - 1) / args.max_steps)


def autocast(device):
    """Mixed precision where the hardware multiplies bfloat16 matrices; weights and states stay in float32."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ---- 3. The loop
class GivenState(nn.Module):
    """A layer that returns a given state, whatever comes in."""

    state = None

    def forward(self, x, **context):
        return self.state


def logits_after(upper, x1):
    """The logits of a state entering layer `end`. upper: the teacher with layers 0..end-1 replaced by a GivenState."""
    upper.get_decoder().layers[0].state = x1
    ids = torch.zeros(x1.shape[:2], dtype=torch.long, device=x1.device)  # any: GivenState ignores them
    return upper(ids, use_cache=False).logits


def seed_step(seed, step):
    """Seed by the step: resuming is exact without saved random states. The factor keeps runs of other seeds apart."""
    torch.manual_seed((seed * 2_654_435_761 + step * WORLD_SIZE + RANK) % 2**32)


def update(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


def score(teacher, student, validation, step):
    kl = evaluate(teacher, {"student": student}, validation)["student"]["kl"].mean().item()
    check_finite(step, validation_kl=kl)
    return kl


def train(args, loss_of, solver, k, student_class=LFTForCausalLM):
    """Train a flow; write the student (a transformers model), checkpoint.pt and log.jsonl to args.out.

    loss_of: a function of (velocity, x0, x1, batch) that returns a scalar. velocity is a function of (x, t). batch has
    ids (batch, seq), the layer's context, the step, and logits, a function from states entering layer `end` to logits.
    solver, k: how the student integrates the flow when it is scored and used; its configuration keeps them.
    """
    start_processes(args.device)
    fill_in(args)
    teacher, tokenizer = load_teacher(args.teacher, args.device)
    fit_to_teacher(args, teacher)
    if args.compile and args.device == "cpu":
        teacher.set_attn_implementation("eager")  # plain operations, which the compiler fuses
    student = make_student(teacher, args, solver, k, student_class)
    velocity = student.flow.velocity
    weights = [weight for weight in velocity.parameters() if weight.requires_grad]
    optimizers = make_optimizers(velocity)

    stream = training_windows(args.data, tokenizer, args.seq_len, args.seed, RANK, WORLD_SIZE)
    validation, _ = held_out_windows(args.data, tokenizer, args.seq_len, VALIDATION_TOKENS)
    made_from = {"solver": solver, "k": k, **hashes(teacher, tokenizer, validation)}
    run = Run(args, made_from, student, tokenizer, [velocity, *optimizers], stream)

    trunk = trunk_of(teacher, args.end)  # the frozen layers up to the span's end, which give x0 and x1
    upper = replace_span(teacher, 0, args.end, GivenState())  # the frozen layers after the span, with the LM head
    if args.compile:
        velocity = torch.compile(velocity)
        for layer in (*trunk.layers, *upper.get_decoder().layers[1:]):
            layer.forward = torch.compile(layer.forward)

    if run.is_new:
        run.log(0, validation_kl=score(teacher, student, validation, 0))
        run.save(0)  # a student that cannot be scored or saved fails before training

    windows = iter(stream)
    micro_batch = args.batch_size // (WORLD_SIZE * args.accumulate)
    losses = []
    with stop_signals() as signals:
        for step in run.steps_left():
            seed_step(args.seed, step)
            loss = torch.zeros((), device=teacher.device)
            for _ in range(args.accumulate):
                ids = take(windows, micro_batch).to(teacher.device)
                with autocast(teacher.device):
                    x0, x1, context = hidden_pair(trunk, ids, args.start)
                    u = functools.partial(velocity, **context)  # so that the loss sees u(x, t)
                    logits = functools.partial(logits_after, upper)
                    batch = SimpleNamespace(ids=ids, context=context, step=step, logits=logits)
                    micro_loss = loss_of(u, x0, x1, batch) / args.accumulate
                micro_loss.backward()
                loss += micro_loss.detach()
            stop = torch.tensor(1.0 * len(signals), device=teacher.device)  # above 0 if any process got a signal
            average_over_processes([loss, stop, *(weight.grad for weight in weights)])

            # One bad batch must not fill the optimizers' averages.
            norm = nn.utils.clip_grad_norm_(weights, 1.0)
            check_finite(step, loss=loss.item(), gradient_norm=norm.item())
            update(optimizers, learning_rate(step, args))
            losses.append(loss.item())

            saving = step % args.save_every == 0 or step == args.max_steps or stop > 0
            if saving or step % 10 == 0:
                figures = {"loss": sum(losses) / len(losses), "gradient_norm": norm.item()}
                losses.clear()
                if saving:
                    figures["validation_kl"] = score(teacher, student, validation, step)
                run.log(step, **figures)
            if saving:
                run.save(step)
            if stop > 0:
                break
    if RANK == 0:
        print(f"saved in {args.out}: python eval_kl.py {args.out}")
