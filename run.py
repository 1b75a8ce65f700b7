"""What surrounds a training loop: the teacher, the run's folder, its log and checkpoint, signals, several processes.

A run's folder holds the student as a transformers model, checkpoint.pt for --resume, and log.jsonl, with a line every
10 steps and at each checkpoint. There is no method in this file.
"""

import atexit
import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lft import InputError

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# Options that a resumed run may change. max_steps changes the learning rates to come; the teacher is known by its hash.
MAY_CHANGE = {"resume", "max_steps", "save_every", "device", "compile", "teacher", "out"}

DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.insert(0, torch.accelerator.current_accelerator().type)  # cuda or mps, the default


# ---- 1. The teacher
def load(model_class, path):
    """`from_pretrained`, frozen and in float32. Raises InputError for missing or unexpected weights."""
    model, report = model_class.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    wrong = report["missing_keys"] | report["unexpected_keys"]
    if wrong:
        raise InputError(f"its weights do not fit its configuration: {min(wrong)} is missing or unexpected")
    return model.requires_grad_(False).eval()


def load_teacher(name, device="cpu"):
    """A frozen causal LM in float32, and its tokenizer. name: tiny_teacher, a folder, or a model on the hub.

    Raises InputError if they cannot be loaded or do not belong together.
    """
    path = Path(__file__).parent / name if name == "tiny_teacher" else name
    try:
        teacher = load(AutoModelForCausalLM, path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and the packages that it calls raise many kinds
        raise InputError(f"cannot load teacher {name}: give a folder, a model on the hub, or tiny_teacher") from error
    if not hasattr(teacher.get_decoder(), "layers"):
        raise InputError(f"{name} is a {teacher.config.model_type}, whose decoder has no list of layers to cut from")
    if tokenizer.eos_token_id is None or len(tokenizer) > teacher.config.vocab_size:
        raise InputError(f"the teacher {name} has no tokenizer that fits it: put the tokenizer's files into its folder")
    return teacher.to(device), tokenizer


def hashes(teacher, tokenizer, validation=None):
    """What a run is made from, as hashes: the teacher with its vocabulary, and the token ids of validation text."""
    config = teacher.config.to_diff_dict() | dict.fromkeys(("_name_or_path", "dtype", "transformers_version"))
    digest = hashlib.sha256(json.dumps([config, tokenizer.get_vocab()], sort_keys=True, default=str).encode())
    for weight in teacher.parameters():
        digest.update(weight.detach().cpu().numpy())
    found = {"teacher_sha256": digest.hexdigest()}
    if validation is not None:
        found["validation_sha256"] = hashlib.sha256(validation.numpy()).hexdigest()
    return found


# ---- 2. A run's folder
class Run:
    """The folder of a run, new or, with --resume, continued from its checkpoint. Raises InputError if it does not fit.

    student, tokenizer: saved as a transformers model. parts: what is trained; saved, and restored on resume, as is the
    position of stream in the text.
    """

    def __init__(self, args, made_from, student, tokenizer, parts, stream):
        self.args = args
        self.student = student
        self.tokenizer = tokenizer
        self.parts = parts
        self.stream = stream
        self.folder = Path(args.out)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.options = vars(args) | made_from | {"world_size": WORLD_SIZE}
        self.step = 0
        self.lines = []  # of the log
        self.is_new = not (args.resume and self.checkpoint.exists())
        if not self.is_new:
            self.restore()
        if RANK == 0:
            self.claim_folder()
            if not self.is_new:
                self.save_student()  # a run that was killed may have left none, or half of one

    def restore(self):
        """Read the checkpoint into parts, stream and log."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for name, value in state["options"].items():
            if name not in MAY_CHANGE and self.options.get(name) != value:
                raise InputError(f"{self.folder} was trained with {name} {value}: give the same again")
        self.step = state["step"]
        self.lines = state["log"]
        self.stream.load_state_dict(state["positions"][RANK])
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)

    def claim_folder(self):
        """Make the folder, which must be empty if the run is new, and write the log up to the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = set(os.listdir(self.folder))
        if self.args.resume:
            found -= {"log.jsonl", "checkpoint.part"}  # of a run that died before its first checkpoint
        if self.is_new and found:
            raise InputError(f"{self.folder} is not empty: add --resume if it holds a run, or give another --out")
        (self.folder / "log.jsonl").write_text("".join(self.lines))

    def steps_left(self):
        return tqdm(range(self.step + 1, self.args.max_steps + 1), unit="step", disable=RANK > 0)

    def log(self, step, **figures):
        """Add a line to the log, with the seconds since 1970."""
        line = json.dumps({"step": step, "time": time.time(), **figures}) + "\n"
        self.lines.append(line)
        if RANK == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(line)

    def save(self, step):
        """Write the checkpoint, whole or not at all, then the student."""
        self.step = step
        positions = [self.stream.state_dict()] * WORLD_SIZE  # in the text; of each process once they are gathered
        if WORLD_SIZE > 1:
            dist.all_gather_object(positions, positions[RANK])
        if RANK > 0:
            return
        state = {
            "step": step,
            "options": self.options,
            "log": self.lines,
            "positions": positions,
            "parts": [part.state_dict() for part in self.parts],
        }
        content = io.BytesIO()  # in memory first: on a full disk, torch.save raises no OSError
        torch.save(state, content)
        temporary = self.folder / "checkpoint.part"
        temporary.write_bytes(content.getbuffer())
        (self.folder / "model.safetensors").unlink(missing_ok=True)  # no older student beside a newer checkpoint
        os.replace(temporary, self.checkpoint)
        self.save_student()

    def save_student(self):
        self.student.config.training = self.options | {"steps": self.step}
        self.student.save_pretrained(self.folder, save_original_format=False)
        self.tokenizer.save_pretrained(self.folder)


def check_finite(step, **figures):
    """Stop on a NaN or infinite value, before it is used or saved."""
    if not all(map(math.isfinite, figures.values())):
        raise InputError(f"step {step} gave {figures}: start again with a lower --lr and another --out")


# ---- 3. Signals and processes
@contextlib.contextmanager
def stop_signals():
    """Inside `with`, Ctrl-C or SIGTERM lets the step finish and be saved; a second signal acts at once, as usual."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_processes(device):
    """Connect the processes that torchrun started; each has a GPU of its own."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD_SIZE > 1:
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)


def average_over_processes(tensors):
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= WORLD_SIZE


def run_script(main):
    """Call a script's main function; common mistakes end in one sentence and exit status 2."""
    logging.disable_progress_bar()
    try:
        main()
    except (InputError, OSError, SafetensorError) as error:  # the last two: for example a full disk
        message = f"error: {error}"
        if error.__cause__ is not None:
            first_line = str(error.__cause__).strip().split("\n")[0]
            message += f" ({first_line})"
        print(message, file=sys.stderr)
        sys.exit(2)
