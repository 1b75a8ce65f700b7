"""The Latent Flow Transformer (arXiv 2505.14513): the method, to be read from top to bottom.

A span of layers [start, end) of a pretrained language model (the teacher) is cut out. In its place stands one learned
velocity field u(x, t), integrated from t = 0 to t = 1:

    x0, the state entering layer `start`   --- dx/dt = u(x, t) --->   x1, the state entering layer `end`

Everything outside the span stays as it was. This file holds the velocity field, the solvers, the layer that stands in
for the span, the teacher and its hidden states, the text, how a flow is saved, and the student, the model with the flow
in it. train_fm.py and train_fw.py hold the two losses; eval_kl.py says how far the student's logits are from the teacher's.

Spans are half-open, as in Python: 6 -> 18 replaces layers 6..17, twelve of them. Hidden states, written x, have the
shape (batch, seq, hidden); times run from 0 to 1.
"""
import copy
import functools
import glob
import hashlib
import itertools
import json
import os
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import torch
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.utils import logging


class InputError(Exception):
    """Bad input, told in one sentence that says what to do; the scripts print it and exit with status 2."""


def first_line(error):
    """What another library's error says, in short."""
    return str(error).strip().split("\n")[0]


# 1. The velocity field


TIME_CHANNELS = 128
# While t goes from 0 to 1, the slowest channel of the time embedding turns by one radian and the fastest by this many,
# so that every channel varies. A sinusoid made for positions 0, 1, 2, … would hardly move.
FASTEST = 1000.0


class VelocityBlock(nn.Module):
    """The velocity field u(x, t): one layer of the teacher's kind, without its outer residual, conditioned on time.

    u(x, t) = α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(x) + β2), where six vectors from t scale (γ), shift (β) and
    gate (α) the two branches of GPT-NeoX's parallel layer, as in a DiT block (Fig. 1). It starts at α = γ = 1 and β = 0
    for every t, so with the weights of a teacher layer, x + u(x, t) is that layer exactly.

    config: the teacher's GPTNeoXConfig. layer: the teacher layer whose weights to start from; None: random weights.
    """

    def __init__(self, config, layer=None):
        super().__init__()
        self.layer = GPTNeoXLayer(config, layer_idx=0)  # taken for its parts: its own forward is never called
        if layer is not None:
            self.layer.load_state_dict(layer.state_dict())
        self.register_buffer("frequencies", torch.logspace(0, 1, TIME_CHANNELS // 2, base=FASTEST), persistent=False)
        self.time_mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, TIME_CHANNELS), nn.SiLU(), nn.Linear(TIME_CHANNELS, 6 * config.hidden_size)
        )
        nn.init.zeros_(self.time_mlp[-1].weight)
        nn.init.zeros_(self.time_mlp[-1].bias)
        self.known, self.known_for = {}, None  # time vectors at inference, and the weights that gave them

    def time_vectors(self, t):
        """The six vectors of time t in one, (6 * hidden,) or (batch, 1, 6 * hidden)."""

        def vectors():
            angles = t * self.frequencies  # (channels / 2,), or (batch, 1, channels / 2)
            return self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))

        weights = list(self.time_mlp.parameters())
        if torch.is_tensor(t) or any(weight.requires_grad for weight in weights):
            return vectors()
        # At inference the same few times come with every token: a frozen block keeps their vectors, until other weights
        # are loaded. (An optimizer may change weights without counting it as a new version, so no other block does.)
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(weights[0].device.type)
        known_for = [modes, *((weight.data_ptr(), weight._version) for weight in weights)]
        if self.known_for != known_for:
            self.known, self.known_for = {}, known_for
        if t not in self.known:
            self.known[t] = vectors()
        return self.known[t]

    def forward(self, x, t, **context):
        """The velocity at state x and time t, (batch, seq, hidden).

        x: (batch, seq, hidden). t: a number, or a tensor (batch, 1, 1) with a time for each sequence.
        context: what the teacher's attention wants beside x: attention_mask, position_embeddings, a cache.
        """
        # DiT's names: β = shift, γ = 1 + scale, and α = 1 + gate. Each is (hidden,), or (batch, 1, hidden).
        shift1, scale1, gate1, shift2, scale2, gate2 = self.time_vectors(t).to(x.dtype).chunk(6, dim=-1)

        layer = self.layer
        attention, _ = layer.attention(layer.input_layernorm(x) * (1 + scale1) + shift1, **context)
        attention = (1 + gate1) * attention
        # Pythia's layers are parallel. Others of the family feed the attention's result to the MLP.
        y = x if layer.use_parallel_residual else x + attention
        mlp = layer.mlp(layer.post_attention_layernorm(y) * (1 + scale2) + shift2)
        return attention + (1 + gate2) * mlp


# 2. The solvers. One step carries the state from time t to time s; times are numbers, or (batch, 1, 1) each.


def euler(velocity, x, t, s):
    """One Euler step from time t to time s (Eq. 4): one evaluation of the velocity, error of order 1."""
    return x + (s - t) * velocity(x, t)


def midpoint(velocity, x, t, s):
    """One midpoint step from time t to time s (Eq. 5): two evaluations of the velocity, error of order 2."""
    d = s - t
    halfway = x + d / 2 * velocity(x, t)
    return x + d * velocity(halfway, t + d / 2)


SOLVERS = {"euler": euler, "midpoint": midpoint}
EVALUATIONS = {"euler": 1, "midpoint": 2}  # of the velocity, in a step


def integrate(velocity, x, times, solver="midpoint"):
    """Walk the state x through a list of times, each step starting where the last one landed.

    Inference (Alg. 3) walks `even_times(k)`; Flow Walking (Alg. 2) walks random times.
    """
    for t, s in itertools.pairwise(times):
        x = SOLVERS[solver](velocity, x, t, s)
    return x


def even_times(steps):
    """The times 0, 1/steps, …, 1 of an inference in `steps` equal steps (Alg. 3)."""
    return [i / steps for i in range(steps + 1)]


# 3. The layer that stands where the span stood


class CacheSlot:
    """A view of a transformers KV cache that puts whatever is written into one given slot."""

    def __init__(self, cache, slot):
        self.cache, self.slot = cache, slot

    def update(self, keys, values, layer_idx):
        return self.cache.update(keys, values, self.slot)


class FlowLayer(nn.Module):
    """Carries the state entering layer `start` to the state entering layer `end`, in `steps` equal steps of `solver`.

    It is called like a decoder layer. The velocity is evaluated several times a token, with other keys and values each
    time, so each evaluation has a slot of its own in the KV cache: those of the layers that the flow replaces.
    """

    def __init__(self, velocity, start, end, solver, steps):
        super().__init__()
        self.velocity, self.start, self.end = velocity, start, end
        self.set(solver, steps)

    def set(self, solver, steps):
        """Choose how to integrate; raises InputError unless it is a solver of SOLVERS and at least one step."""
        if solver not in SOLVERS or not steps >= 1:
            raise InputError(f"{solver} x{steps} is no way to integrate: give {' or '.join(SOLVERS)} and at least 1 step")
        self.solver, self.steps = solver, steps
        self.evaluations = steps * EVALUATIONS[solver]  # of the velocity
        self.can_cache = self.evaluations <= self.end - self.start

    def forward(self, x, layer_past=None, **context):
        slots = iter(range(self.start, self.end))
        if layer_past is not None and not self.can_cache:
            raise InputError(
                f"{self.solver} x{self.steps} evaluates the velocity {self.evaluations} times and the replaced layers leave "
                f"{self.end - self.start} cache slots: take fewer steps, or call the model with use_cache=False"
            )

        def velocity(x, t):
            cache = None if layer_past is None else CacheSlot(layer_past, next(slots))
            return self.velocity(x, t, layer_past=cache, **context)

        return integrate(velocity, x, even_times(self.steps), self.solver)


# 4. The teacher and its hidden states


TINY_TEACHER = "tiny_teacher"  # the embedded teacher, in the folder of that name beside this file


def load_teacher(name, device="cpu"):
    """Load a GPT-NeoX teacher, frozen, in float32 whatever its files hold, and its tokenizer.

    name: "tiny_teacher", a folder, or a model on the hub such as "EleutherAI/pythia-410m".
    Raises InputError if there is no such model, if it is not a GPT-NeoX, or if it lacks weights or a tokenizer.
    """
    path = Path(__file__).parent / name if name == TINY_TEACHER else name
    try:
        family = AutoConfig.from_pretrained(path).model_type
        if family != "gpt_neox":
            raise InputError(f"teacher {name} is a {family} model: give a GPT-NeoX, such as EleutherAI/pythia-410m")
        teacher, report = GPTNeoXForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no teacher at {name}: it is neither a folder with a whole transformers model in safetensors nor such a model "
            f"on a hub that can be reached; correct it, or use --teacher {TINY_TEACHER} ({first_line(error)})"
        ) from error
    if report["missing_keys"]:  # transformers would make them up
        raise InputError(f"teacher {name} lacks {len(report['missing_keys'])} of its weights: give a whole model")
    if not tokenizer("text")["input_ids"] or tokenizer.eos_token_id is None or len(tokenizer) > teacher.config.vocab_size:
        raise InputError(f"teacher {name} has no tokenizer that fits it: put the tokenizer's files into its folder")
    teacher.config.use_cache = True  # unless asked otherwise, whatever its files say
    return teacher.requires_grad_(False).eval().to(device), tokenizer


def layer_range(start, end):
    """How every message names a span: by the first and the last layer that it replaces, "6..17" for 6 -> 18."""
    return f"{start}..{end - 1}"


def check_span(teacher, start, end):
    """Raise InputError unless 0 <= start < end <= the teacher's number of layers."""
    layers = teacher.config.num_hidden_layers
    if not 0 <= start < end <= layers:
        raise InputError(
            f"{start} to {end} is no span of this teacher's {layers} layers: give 0 <= start < end <= {layers} (the end is "
            f"not replaced: 6 to 18 means layers {layer_range(6, 18)})"
        )


@torch.compiler.disable  # compiled, the mask would be made in full, and attention could not take its fast causal path
def embed(model, ids):
    """The state entering layer 0, (batch, seq, hidden), and the context that every layer is called with, a dict.

    ids: (batch, seq), full sequences without padding.
    """
    x = model.gpt_neox.embed_in(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = create_causal_mask(config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
    return x, {"attention_mask": mask, "position_embeddings": model.gpt_neox.rotary_emb(x, positions)}


def run_layers(model, x, start, end, context):
    """Carry the state entering layer `start` through layers [start, end)."""
    for layer in model.gpt_neox.layers[start:end]:
        x = layer(x, **context)
    return x


@torch.no_grad()
def hidden_pair(teacher, ids, start, end):
    """The training pair for a span: the states x0 entering layer `start` and x1 entering layer `end`.

    Only layers [0, end) run. If the span ends the model, x1 is the state before the final norm. Returns x0, x1, both
    (batch, seq, hidden), and the context to call the velocity with.
    """
    x, context = embed(teacher, ids)
    x0 = run_layers(teacher, x, 0, start, context)
    x1 = run_layers(teacher, x0, start, end, context)
    return x0, x1, context


# 5. Text


def is_held_out(name):
    """Whether a file of the standard library is among the 1 in 20 that are never trained on, by a hash of its path."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def stdlib_documents(split):
    """Yield the source files of the running Python's standard library, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not any(part in ("site-packages", "test", "tests") or part.endswith("_test") for part in name.parts):
            if is_held_out(name.as_posix()) == (split == "held-out"):
                yield path.read_text(encoding="utf-8", errors="replace")


def file_documents(pattern, split):
    """Yield the text files that a path or a glob names; the last twentieth of each is its held-out part."""
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise InputError(f"no file is named by {pattern}: give a text file, or a glob such as 'books/*.txt'")
    for path in paths:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        cut = len(text) * 19 // 20
        yield text[cut:] if split == "held-out" else text[:cut]


# For each of our splits, the hub's splits that serve, the best first, and their files.
HUB_SPLITS = {"train": {"train": "train*"}, "held-out": {"validation": "val*", "test": "test*"}}


def hub_split(name, split):
    """The rows of a hub data set, streamed: its training split, or its validation or else its test split, or None."""
    splits = load_dataset(name, streaming=True)
    for key in HUB_SPLITS[split]:
        if key in splits:
            return splits[key]
    for key, files in HUB_SPLITS[split].items():  # a folder train/ hides the files beside it, as in the Pile's data set
        try:
            return load_dataset(name, data_files={key: files}, split=key, streaming=True)
        except FileNotFoundError:
            continue
    return None


def hub_documents(name, split, place=None, rank=0, processes=1):
    """Yield the column "text" of a hub data set, or of a folder laid out like one, streamed.

    place: a dict that keeps, under "rows", how far the reading is; what it holds at the start is gone on from. rank,
    processes: each of several processes reads rows of its own.
    """
    place = {} if place is None else place
    try:
        rows = hub_split(name, split)
        if rows is None:
            raise InputError(f"data set {name} has no {' or '.join(HUB_SPLITS[split])} split: use another")
        rows = split_dataset_by_node(rows, rank, processes)
        if "rows" in place:
            rows.load_state_dict(place["rows"])
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise InputError(f'data set {name} has no text in a column "text", only {", ".join(row)}: use another')
            place["rows"] = rows.state_dict()
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no text at {name}: it is neither a file here nor a data set, on the hub or in a folder, that can be reached and "
            f"read; correct the name, or use --data stdlib ({first_line(error)})"
        ) from error


def is_local(data):
    """Whether `data` names text files on this machine, and not a data set, on the hub or in a folder."""
    return data == "stdlib" or os.path.isfile(data) or any(sign in data for sign in "*?[")


def documents(data, split):
    """Yield the texts of one pass over `data`: "stdlib", a path or glob of text files, or a data set.

    split: "train" or "held-out", which share no text. Raises InputError if there is no such data set.
    """
    if data == "stdlib":
        return stdlib_documents(split)
    return file_documents(data, split) if is_local(data) else hub_documents(data, split)


def token_sequences(documents, tokenizer, seq_len):
    """Join documents, each closed by the end-of-text token, and yield full sequences, (seq_len,) each."""
    tokens = []
    for text in documents:
        tokens += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        full = len(tokens) // seq_len * seq_len
        yield from torch.tensor(tokens[:full], dtype=torch.long).view(-1, seq_len)
        tokens = tokens[full:]


def text_sequences(data, split, tokenizer, seq_len):
    """One pass over `data`, cut into sequences of seq_len tokens; raises InputError if there is not one of them."""
    sequences = token_sequences(documents(data, split), tokenizer, seq_len)
    first = next(sequences, None)
    if first is None:
        raise InputError(
            f"data {data} holds less than one {split} sequence of {seq_len} tokens: give more text, or a smaller "
            "--seq-len (of local files, the last twentieth of each is held out)"
        )
    return itertools.chain([first], sequences)


def evenly(items, n):
    """n of the items, or all, at even distances."""
    return [items[i] for i in torch.linspace(0, len(items) - 1, min(n, len(items))).long()]


VALIDATION_TOKENS = 16_384


def held_out_tokens(data, tokenizer, seq_len, tokens=None):
    """Held-out tokens of `data` in full sequences, one at least: (sequences, seq_len).

    tokens: how many for a test, which shares no sequence with validation; None: the VALIDATION_TOKENS that training scores
    itself on, and that a recipe may be chosen by. Of local text both are spread over the whole held-out part; of a streamed
    data set every other sequence is for validation, from the front. Raises InputError if nothing is left for a test.
    """
    test = tokens is not None
    wanted = max(1, (tokens if test else VALIDATION_TOKENS) // seq_len)
    sequences = text_sequences(data, "held-out", tokenizer, seq_len)
    if is_local(data):
        sequences = list(sequences)
        numbers = range(len(sequences))
        validation = evenly(numbers, max(1, min(VALIDATION_TOKENS // seq_len, len(sequences) // 2)))  # half at most
        others = sorted(set(numbers) - set(validation))
        sequences = [sequences[number] for number in (evenly(others, wanted) if test else validation)]
    else:
        sequences = list(itertools.islice(sequences, int(test), 2 * wanted, 2))
    if not sequences:
        raise InputError(f"data {data} holds one held-out sequence of {seq_len} tokens, which is for validation: give more text")
    return torch.stack(sequences)


def local_batches(data, tokenizer, batch_size, seq_len, seed, state, rank, processes):
    """The training batches of local text, held in memory: its sequences in a new order each pass."""
    sequences = torch.stack(list(text_sequences(data, "train", tokenizer, seq_len)))

    @functools.lru_cache(maxsize=2)
    def order(n):  # of the n-th pass
        return torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed + 1_000_003 * n))

    while True:
        first = state.get("taken", 0) + rank * batch_size
        state["taken"] = state.get("taken", 0) + processes * batch_size  # sequences, by all processes
        yield torch.stack([sequences[order(i // len(sequences))[i % len(sequences)]] for i in range(first, first + batch_size)])


def streamed_batches(data, tokenizer, batch_size, seq_len, seed, state, rank, processes):
    """The training batches of a data set, streamed in the order it has there; the seed changes nothing."""
    wanted, place, tokens = batch_size * seq_len, {"rows": state["rows"]} if state else {}, state.get("tokens", [])
    documents = hub_documents(data, "train", place, rank, processes)
    while True:
        while len(tokens) < wanted:
            texts = list(itertools.islice(documents, 64))  # a few at a time: the tokenizer takes them in parallel
            if texts:
                ids = tokenizer(texts, verbose=False)["input_ids"]
                tokens = tokens + [token for document in ids for token in (*document, tokenizer.eos_token_id)]
            elif place:  # the end of a pass
                place.clear()
                documents = hub_documents(data, "train", place, rank, processes)
            else:
                raise InputError(f"data set {data} has fewer rows than there are processes: start fewer, or use another")
        batch, tokens = tokens[:wanted], tokens[wanted:]
        state.update(rows=place["rows"], tokens=tokens)
        yield torch.tensor(batch).view(batch_size, seq_len)


def token_batches(data, tokenizer, batch_size, seq_len, seed, state=None, rank=0, processes=1):
    """Training batches (batch, seq) without end, one pass over `data` after another.

    state: a dict that says where in the text the last batch ended; one that was saved is gone on from. rank, processes: each
    of several processes has its own part of the text. Raises InputError if there is not one sequence of text.
    """
    next(text_sequences(data, "train", tokenizer, seq_len))  # now, and not when the first batch is taken
    batches = local_batches if is_local(data) else streamed_batches
    return batches(data, tokenizer, batch_size, seq_len, seed, {} if state is None else state, rank, processes)


# 6. Saving and loading a flow: a folder with flow.safetensors, the velocity's weights, and flow.json, what they are for


FORMAT = 1


def fingerprint(teacher):
    """A hash of the teacher's weights, so that a flow is never put into another model than its own."""
    digest = hashlib.sha256()
    for weight in teacher.parameters():
        digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def describe_teacher(teacher):
    """What a flow's flow.json says of its teacher, and what is compared when the flow is loaded."""
    config = teacher.config
    return {
        "family": config.model_type, "layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "fingerprint": fingerprint(teacher),
    }  # fmt: skip


def made_for(info):
    """What the weights file says of itself, so that it is never read with the flow.json of another run."""
    return f"{info['teacher_is']['fingerprint']} {info['start']} {info['end']}"


def flush(path):
    """Have the disk hold what was written to a file or folder, before anything later."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path, write):
    """Write a file whole or not at all, wherever the process or the machine stops: write(path) gets a temporary name.

    Raises InputError if it cannot be written; what was there before is there still.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written, and is as it was: make room, or give another folder ({first_line(error)})") from error


def save_flow(folder, velocity, info):
    """Write flow.safetensors and flow.json into `folder`, each whole or not at all.

    info: a dict of at least "teacher" (its name), "teacher_is" (describe_teacher), "start", "end", "solver", "steps",
    "data" and "seq_len".
    """
    weights, metadata = velocity.state_dict(), {"made_for": made_for(info)}
    write_whole(Path(folder) / "flow.safetensors", lambda path: save_file(weights, path, metadata))
    write_whole(Path(folder) / "flow.json", lambda path: path.write_text(json.dumps({"format": FORMAT, **info}, indent=2) + "\n"))


def read_info(folder):
    """What flow.json in `folder` says; raises InputError if there is no run there, or one cut short."""
    try:
        info = json.loads((Path(folder) / "flow.json").read_text())
        if info["format"] != FORMAT:
            raise InputError(f"run {folder} has format {info['format']}, and this code reads {FORMAT}: train it anew")
        return {key: info[key] for key in ("teacher", "teacher_is", "start", "end", "solver", "steps", "data", "seq_len")} | info
    except OSError as error:
        raise InputError(f"no run at {folder}: give a folder that train_fm.py or train_fw.py wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the flow.json of run {folder} is damaged or cut short: train it anew") from error


def read_curve(folder):
    """The (training tokens, held-out KL) that a run's log.jsonl holds, a list; raises InputError if there are none."""
    try:
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        curve = [(line["tokens"], line["held_out_kl"]) for line in log if "held_out_kl" in line]
        if not curve:
            raise ValueError("no line has one")
        return curve
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the log.jsonl of run {folder} holds no held-out KL ({first_line(error)}): train it to its end") from error


def load_flow(folder, teacher):
    """Load a saved flow for this teacher: its VelocityBlock, on the teacher's device, and its info.

    Raises InputError if the run is missing or cut short, or was trained on another teacher.
    """
    info = read_info(folder)
    for key, value in describe_teacher(teacher).items():
        if info["teacher_is"].get(key) != value:
            raise InputError(
                f"run {folder} was trained on another teacher, {info['teacher']} as it was then: its {key} is "
                f"{info['teacher_is'].get(key)} and this one's {value}; give that teacher, or train anew"
            )
    check_span(teacher, info["start"], info["end"])
    velocity = VelocityBlock(teacher.config)
    try:
        with safe_open(Path(folder) / "flow.safetensors", "pt") as file:
            if (file.metadata() or {}).get("made_for") != made_for(info):
                raise InputError(f"the flow.safetensors and flow.json of run {folder} are of different runs: train it anew")
            velocity.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"the flow.safetensors of run {folder} is missing, damaged or cut short: train it anew") from error
    return velocity.requires_grad_(False).eval().to(next(teacher.parameters()).device), info


# 7. The student


class Student(GPTNeoXForCausalLM):
    """A GPT-NeoX with a FlowLayer among its layers, made by `replace_span` or `load_student`.

    It is used like any model of transformers: called, generated from, with a KV cache or without.
    """

    @property
    def flow(self):
        """The FlowLayer."""
        return next(layer for layer in self.gpt_neox.layers if isinstance(layer, FlowLayer))

    def set_flow(self, solver=None, steps=None):
        """Change how the flow is integrated from now on; None leaves as it is. Raises InputError for fewer than 1 step."""
        self.flow.set(solver or self.flow.solver, self.flow.steps if steps is None else steps)
        self.config.use_cache = self.flow.can_cache  # the default of a plain call; generating without a cache is to be asked for

    def save_pretrained(self, folder, **options):
        """Write the whole student into a folder for `load_student`, which needs no teacher and no hub then.

        transformers' own format would load "successfully", with random layers in the flow's place; so this one has files
        that transformers does not take for a model. Weights are stored in float16 where that loses nothing.
        """
        weights = {name: weight.half() if (weight.half() == weight).all() else weight for name, weight in self.state_dict().items()}
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        flow = {"start": self.flow.start, "end": self.flow.end, "solver": self.flow.solver, "steps": self.flow.steps}
        text = json.dumps({"format": FORMAT, **flow, "config": self.config.to_dict()}, indent=2)
        write_whole(Path(folder) / "student.safetensors", lambda path: save_file(weights, path))
        write_whole(Path(folder) / "student.json", lambda path: path.write_text(text))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise InputError("a student is loaded by lft.load_student(folder)")


def replace_span(teacher, start, end, flow=None):
    """The student: the teacher with layers [start, end) replaced by a FlowLayer, or by nothing (skipping).

    Returns a GPTNeoXForCausalLM of its own that shares the teacher's weights; the teacher is left as it was.
    """
    check_span(teacher, start, end)
    weights = [*teacher.parameters(), *(flow.parameters() if flow else ())]
    shared = {id(weight): weight for weight in weights}
    student, flow = copy.deepcopy((teacher, flow), shared)  # copies the modules but not the weights
    layers = student.gpt_neox.layers
    student.gpt_neox.layers = nn.ModuleList([*layers[:start], *([flow] if flow else []), *layers[end:]])
    if flow:
        student.__class__ = Student
        student.set_flow()
        flow.velocity.layer.attention.config = student.config  # which says how to attend, and so what the mask means
    else:  # a shorter model of the same kind, whose layers count their cache slots anew
        student.config.num_hidden_layers = len(student.gpt_neox.layers)
        for index, layer in enumerate(student.gpt_neox.layers):
            layer.attention.layer_idx = index
    return student


def load_student(folder, device="cpu"):
    """Load a student and its tokenizer from a run, or from a folder that the student's own `save_pretrained` wrote.

    Raises InputError if there is neither, or if it is cut short, or if a run's teacher is not to be had.
    """
    folder = Path(folder)
    if not (folder / "student.json").exists():
        info = read_info(folder)
        teacher, tokenizer = load_teacher(info["teacher"], device)
        velocity, _ = load_flow(folder, teacher)
        flow = FlowLayer(velocity, info["start"], info["end"], info["solver"], info["steps"])
        return replace_span(teacher, info["start"], info["end"], flow), tokenizer
    try:
        said = json.loads((folder / "student.json").read_text())
        config = GPTNeoXConfig.from_dict(said["config"])
        flow = FlowLayer(VelocityBlock(config), said["start"], said["end"], said["solver"], said["steps"])
        student = replace_span(GPTNeoXForCausalLM(config), said["start"], said["end"], flow)
        student.load_state_dict(load_file(folder / "student.safetensors"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the student in {folder} is damaged or cut short: save it anew ({first_line(error)})") from error
    return student.requires_grad_(False).eval().to(device), tokenizer


# 8. What the scripts share


def default_seq_len(teacher):
    """The tokens in a sequence unless asked otherwise: half the teacher's positions."""
    return teacher.config.max_position_embeddings // 2


def check_seq_len(teacher, seq_len, option="--seq-len"):
    """Raise InputError unless a sequence of seq_len tokens fits the teacher and has a next token to predict."""
    positions = teacher.config.max_position_embeddings
    if not 2 <= seq_len <= positions:
        raise InputError(f"{option} {seq_len} does not fit this teacher: give 2 to {positions}, its number of positions")


def pick_device(name=None):
    """The device of that name, "cpu" or "cuda"; None: a CUDA GPU if there is one. Raises InputError if there is none.

    A process that torchrun started has the GPU of its own rank.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise InputError(f"--device {name} is not to be had on this machine: use --device cpu") from error
    return device


def check_positive(args, *options):
    """Raise InputError if one of these options is given and is not above 0."""
    for option in options:
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise InputError(f"--{option.replace('_', '-')} {value} is too small: give more than 0")


def run_script(main):
    """Run a script's main function; bad input ends in its one sentence on standard error, and exit status 2."""
    logging.disable_progress_bar()  # what goes wrong while loading is said once, by us
    logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
