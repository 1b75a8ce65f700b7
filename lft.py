"""The Latent Flow Transformer (arXiv 2505.14513): the method, to be read from top to bottom.

A span of layers [start, end) of a pretrained language model, the teacher, is cut out. In its place stands one learned
velocity field u(x, t), integrated from t = 0 to t = 1:

    x0, the state entering layer `start`   --- dx/dt = u(x, t) --->   x1, the state entering layer `end`

Spans are half-open, as in Python: 6 -> 18 replaces layers 6..17, twelve of them. Hidden states, written x, have the shape
(batch, seq, hidden).

Everything here is a model of transformers: `replace_span` makes a student, or a teacher with layers skipped, from the
teacher, and all of them are called, cached, timed and scored in the same way. This file needs torch and transformers only,
because a copy of it goes into the folder of every saved student.
"""
import contextlib
import copy
import hashlib
import itertools
import json
import os
import struct
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


class InputError(Exception):
    """Bad input, told in one sentence that says what to do; the scripts print it and exit with status 2."""


# What libraries raise for files that are missing, damaged, or no such thing.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, StopIteration, SafetensorError, struct.error)


def first_line(error):
    """What a library's error says, in short."""
    return str(error).strip().split("\n")[0]


# 1. The velocity field

TIME_CHANNELS = 128
# While t goes from 0 to 1, the slowest channel of the time embedding turns by one radian and the fastest by this many.
FASTEST = 1000.0


def attention_of(layer):
    """A decoder layer's attention: GPT-NeoX has it under one name, Llama, Mistral and Qwen under another."""
    return layer.attention if hasattr(layer, "attention") else layer.self_attn


class VelocityBlock(nn.Module):
    """The velocity field u(x, t): one layer of the teacher's kind without its outer residual, conditioned on time.

    u(x, t) = α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2), where six vectors from t shift (β), scale (γ) and gate
    (α) the two branches, as in a DiT block (Fig. 1). y is x in Pythia's parallel layers, and x plus the first branch in
    others. It starts at α = γ = 1 and β = 0 for every t, where x + u(x, t) is the layer itself.

    layer: the teacher's layer to start from, a copy of which is trained.
    """

    def __init__(self, layer):
        super().__init__()
        config = attention_of(layer).config  # not copied, so that a model and its velocity attend in the same way
        self.layer = copy.deepcopy(layer, {id(config): config}).requires_grad_(True)
        hidden = layer.input_layernorm.weight.numel()
        self.time_mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, TIME_CHANNELS), nn.SiLU(), nn.Linear(TIME_CHANNELS, 6 * hidden))
        nn.init.zeros_(self.time_mlp[-1].weight)
        nn.init.zeros_(self.time_mlp[-1].bias)

    def forward(self, x, t, **context):
        """The velocity at state x and time t, (batch, seq, hidden).

        x: (batch, seq, hidden). t: a number, or (batch, 1, 1), a time for each sequence. context: what a decoder layer is
        called with beside x: mask, rotary embedding, cache.
        """
        frequencies = torch.logspace(0, 1, TIME_CHANNELS // 2, base=FASTEST, dtype=torch.float32, device=x.device)
        angles = t * frequencies  # (channels / 2,), or (batch, 1, channels / 2)
        time = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.time_mlp[0].weight.dtype)
        # DiT's names: β = shift, γ = 1 + scale, α = 1 + gate. Each is (hidden,), or (batch, 1, hidden).
        shift1, scale1, gate1, shift2, scale2, gate2 = self.time_mlp(time).to(x.dtype).chunk(6, dim=-1)

        layer = self.layer
        attention, _ = attention_of(layer)(layer.input_layernorm(x) * (1 + scale1) + shift1, **context)
        attention = (1 + gate1) * attention
        y = x if getattr(layer, "use_parallel_residual", False) else x + attention
        mlp = layer.mlp(layer.post_attention_layernorm(y) * (1 + scale2) + shift2)
        return attention + (1 + gate2) * mlp


# 2. The solvers. A step carries the state from time t to time s; times are numbers, or (batch, 1, 1) each.


def euler(velocity, x, t, s):
    """One Euler step (Eq. 4), x + d·u(x, t) with d = s - t: one evaluation of the velocity, error of order 1."""
    return x + (s - t) * velocity(x, t)


def midpoint(velocity, x, t, s):
    """One midpoint step (Eq. 5), x + d·u(x + d/2·u(x, t), t + d/2): two evaluations of the velocity, error of order 2."""
    d = s - t
    halfway = x + d / 2 * velocity(x, t)
    return x + d * velocity(halfway, t + d / 2)


SOLVERS = {"euler": euler, "midpoint": midpoint}
EVALUATIONS = {"euler": 1, "midpoint": 2}  # of the velocity, in a step


def integrate(velocity, x, times, solver="midpoint"):
    """Walk the state x through a list of times, each step starting where the last one landed (Alg. 2 and 3)."""
    for t, s in itertools.pairwise(times):
        x = SOLVERS[solver](velocity, x, t, s)
    return x


# 3. The flow in the place of its span


class FlowLayer(GradientCheckpointingLayer):
    """Carries x0 to x1 in k equal steps (Alg. 3); it is called like the decoder layers that it replaces.

    Each evaluation of the velocity has keys and values of its own, so each attention in the velocity takes a slot of the KV
    cache for each evaluation, of those that the replaced layers leave. Raises InputError where they leave too few.
    """

    def __init__(self, velocity, start, end, solver="midpoint", k=3):
        super().__init__()
        self.velocity, self.start, self.end, self.solver, self.k = velocity, start, end, solver, k

    @property
    def evaluations(self):
        """How many times the velocity is evaluated for each token."""
        if self.solver not in SOLVERS or self.k < 1:
            raise InputError(f"{self.solver} x{self.k} is no way to integrate: give {' or '.join(SOLVERS)}, and k of 1 or more")
        return self.k * EVALUATIONS[self.solver]

    def forward(self, x, **context):
        attentions = [module for module in self.velocity.modules() if hasattr(module, "layer_idx")]
        needed = self.evaluations * len(attentions)
        cache = context.get("past_key_values", context.get("layer_past"))  # GPT-NeoX calls it layer_past
        if cache is not None and needed > self.end - self.start:
            raise InputError(
                f"{self.solver} x{self.k} needs {needed} cache slots, and the {self.end - self.start} "
                "replaced layers leave one each: take fewer steps k, or call the model with use_cache=False"
            )
        slots = itertools.count(self.start)

        def velocity(x, t):
            for attention in attentions:
                attention.layer_idx = next(slots)  # where the attention puts its keys and values
            return self.velocity(x, t, **context)

        return integrate(velocity, x, [i / self.k for i in range(self.k + 1)], self.solver)


def backbone(model):
    """The part of a causal LM between ids and logits: embedding, `layers`, final norm."""
    return model.get_decoder()


def final_norm(model):
    """The norm between a causal LM's last layer and its head."""
    return backbone(model).final_layer_norm if hasattr(backbone(model), "final_layer_norm") else backbone(model).norm


def check_span(model, start, end):
    """Raise InputError unless 0 <= start < end <= the model's number of layers."""
    number = len(backbone(model).layers)
    if not 0 <= start < end <= number:
        raise InputError(
            f"{start} to {end} is no span of this teacher's {number} layers: give 0 <= start < end <= {number} (the end is not "
            "replaced: 6 to 18 means layers 6..17)"
        )


def share(*modules):
    """Copies of modules, with settings of their own and the very weights of the originals; None stays None."""
    weights = itertools.chain.from_iterable(module.parameters() for module in modules if module is not None)
    return copy.deepcopy(modules, {id(weight): weight for weight in weights})


def replace_span(teacher, start, end, layer=None):
    """The teacher with layers [start, end) replaced by one layer, or by nothing; a model of its own with the teacher's weights.

    The weights are shared, so whoever trains the one trains the other too; settings are not. layer: a FlowLayer, or any
    module that is called like a decoder layer. Raises InputError as `check_span` does.
    """
    check_span(teacher, start, end)
    model, layer = share(teacher, layer)
    layers = backbone(model).layers
    for depth, kept in enumerate(layers):
        kept.depth = depth  # its place in the teacher, by which eval_kl.py finds what stands for the input of layer `end`
    backbone(model).layers = nn.ModuleList([*layers[:start], *([] if layer is None else [layer]), *layers[end:]])
    if layer is None:  # a shorter model of the same kind, whose layers count their cache slots anew
        model.config.num_hidden_layers = len(backbone(model).layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: len(backbone(model).layers)]
        for slot, kept in enumerate(backbone(model).layers):
            attention_of(kept).layer_idx = slot
    return model


# 4. The training pair


@contextlib.contextmanager
def record_inputs(*modules):
    """Within the block, the list that this yields gets (state, context) of each call of the modules, in the order of calls."""
    calls = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, context: calls.append((args[0], context)), with_kwargs=True)
        for module in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def trunk_of(teacher, end):
    """The teacher's layers [0, end) as a model; the state x1 is what enters its final norm."""
    number = len(backbone(teacher).layers)
    return replace_span(teacher, end, number) if end < number else share(teacher)[0]


@torch.no_grad()
def hidden_pair(trunk, ids, start):
    """The training pair of a span: the states x0 entering layer `start` and x1 entering layer `end`, for the same tokens.

    trunk: what `trunk_of(teacher, end)` returned. ids: (batch, seq), without padding. Returns x0 and x1, both
    (batch, seq, hidden), and the context that the teacher itself calls layer `start` with, a dict, to call the velocity with.
    """
    with record_inputs(backbone(trunk).layers[start], final_norm(trunk)) as calls:
        backbone(trunk)(ids, use_cache=False)
    (x0, context), (x1, _) = calls
    return x0, x1, context


# 5. The teacher

TINY_TEACHER = "tiny_teacher"  # the embedded teacher, in the folder of that name beside this file


@torch.no_grad()
def fits(teacher):
    """Whether this teacher's layers compute what VelocityBlock assumes, and all attend alike; the last is tried on a few tokens.

    The formula is written out again, since a fork may change VelocityBlock, and which teachers fit is not to change with it.
    """
    if len(set(getattr(teacher.config, "layer_types", None) or [None])) > 1:
        return False
    try:
        last = len(backbone(teacher).layers) - 1
        layer = backbone(teacher).layers[last]
        x0, x1, context = hidden_pair(teacher, torch.arange(8, device=teacher.device)[None], last)
        attention, _ = attention_of(layer)(layer.input_layernorm(x0), **context)
        y = x0 if getattr(layer, "use_parallel_residual", False) else x0 + attention
        error = attention + layer.mlp(layer.post_attention_layernorm(y)) - (x1 - x0)
    except (AttributeError, TypeError, ValueError):
        return False
    return bool(error.norm() <= 1e-4 * (x1 - x0).norm())


def load_teacher(name, device="cpu"):
    """Load a teacher, frozen, in float32 whatever its files hold, and its tokenizer.

    name: "tiny_teacher", a folder, a .gguf file, or a model on the hub such as "EleutherAI/pythia-410m".
    Raises InputError if there is no such model, if it lacks weights or a tokenizer, or if its layers are made otherwise.
    """
    path = Path(__file__).parent / name if name == TINY_TEACHER else Path(name)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent if gguf else path)
    try:
        teacher, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **(gguf or {"use_safetensors": True})
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    except UNREADABLE as error:
        raise InputError(
            f"no teacher at {name}: it is no folder, .gguf file or model on a hub in reach that transformers can load from "
            f"safetensors; correct it, or use --teacher {TINY_TEACHER} ({first_line(error)})"
        ) from error
    if report["missing_keys"]:  # transformers would make them up
        raise InputError(f"teacher {name} lacks {len(report['missing_keys'])} of its weights: give a whole model")
    if not tokenizer("text")["input_ids"] or tokenizer.eos_token_id is None or len(tokenizer) > teacher.config.vocab_size:
        raise InputError(f"teacher {name} has no tokenizer that fits it: put the tokenizer's files into its folder")
    teacher = teacher.requires_grad_(False).eval().to(device)
    if not fits(teacher):
        raise InputError(
            f"teacher {name} is a {teacher.config.model_type} model, whose layers are made otherwise than VelocityBlock: give a GPT-NeoX "
            "(Pythia), Llama, Mistral, Qwen2 or Qwen3 whose layers all attend alike"
        )
    return teacher, tokenizer


def fingerprint(module):
    """A hash of a module's weights, to tell one teacher or one flow from another."""
    digest = hashlib.sha256()
    for weight in module.parameters():
        digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


# 6. The student


class LFTConfig(PreTrainedConfig):
    """What a student is.

    text_config: the teacher's configuration, a dict. start, end: the span. solver, k: how the flow is integrated; both may be
    changed at any time. teacher, fingerprint: the teacher's name and the hash of its weights. velocity: the name of the class
    that built it. training: the options and the number of tokens that it was trained with.
    """

    model_type = "lft"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self, text_config=None, start=0, end=1, solver="midpoint", k=3, teacher=None, fingerprint=None, velocity=None,
        training=None, **kwargs,
    ):  # fmt: skip
        self.text_config = AutoConfig.for_model(**text_config) if text_config else None
        self.start, self.end, self.solver, self.k = start, end, solver, k
        self.teacher, self.fingerprint, self.velocity, self.training = teacher, fingerprint, velocity, training or {}
        super().__init__(**kwargs)


class LFTForCausalLM(PreTrainedModel, GenerationMixin):
    """The student: a causal LM of transformers, whose saved folder carries this file and loads wherever transformers does.

    teacher: the model whose layers, weights and all, stand outside the span; None: layers that `from_pretrained` fills.
    """

    config_class = LFTConfig
    velocity_class = VelocityBlock
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config, teacher=None):
        super().__init__(config)
        if config.velocity not in (None, self.velocity_class.__name__):
            raise InputError(f"this student was built by another velocity class, {config.velocity}: load it with the code that trained it")
        config.velocity = self.velocity_class.__name__
        teacher = AutoModelForCausalLM.from_config(config.text_config) if teacher is None else teacher
        check_span(teacher, config.start, config.end)
        velocity = self.velocity_class(backbone(teacher).layers[config.start])
        flow = FlowLayer(velocity, config.start, config.end, config.solver, config.k)
        self.model = replace_span(teacher, config.start, config.end, flow)
        self.config.text_config = self.model.config
        self.post_init()

    def init_weights(self):
        """Nothing to make up: the weights are the teacher's, or about to be loaded."""
        self.tie_weights()

    @property
    def flow(self):
        """The FlowLayer."""
        return backbone(self).layers[self.config.start]

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, head):
        self.model.set_output_embeddings(head)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
        use_cache=None, logits_to_keep=0, output_hidden_states=None, **kwargs,
    ):  # fmt: skip
        """As any causal LM of transformers. hidden_states: one entering each layer or flow, and the last one after the norm."""
        self.flow.solver, self.flow.k = self.config.solver, self.config.k
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        kwargs |= {"inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if not (self.config.output_hidden_states if output_hidden_states is None else output_hidden_states):
            return self.model(input_ids, **kwargs)
        norm = final_norm(self)  # transformers itself would look for layers of the teacher's class, and miss the flow
        with record_inputs(*backbone(self).layers, norm) as calls:
            output = self.model(input_ids, **kwargs)
        output.hidden_states = (*(x for x, _ in calls[:-1]), norm(calls[-1][0]))
        return output

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        student, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise InputError(f"{args[0]} lacks weights of a student, which transformers would make up: save it anew")
        return (student, report) if output_loading_info else student


LFTConfig.register_for_auto_class()
LFTForCausalLM.register_for_auto_class("AutoModelForCausalLM")


# 7. Runs: a run's folder holds flow.safetensors, the velocity's weights with the student's configuration in its header


def write_whole(path, content):
    """Write bytes to a file, whole or not at all, wherever the process or the machine stops; raises InputError if that fails."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} could not be written, and is as it was: make room, or give another folder ({error.strerror})") from error


def save_flow(folder, student):
    """Write a student's flow into the folder of its run."""
    metadata = {"config": student.config.to_json_string(use_diff=False)}
    write_whole(Path(folder) / "flow.safetensors", save(student.flow.velocity.state_dict(), metadata))


def read_run(folder):
    """The configuration and the velocity's weights that a run holds; raises InputError if there is no run, or one cut short."""
    path = Path(folder) / "flow.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return LFTConfig(**json.loads(file.metadata()["config"])), {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise InputError(f"no run at {folder}: give a folder that train_fm.py or train_fw.py wrote") from error
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged or no flow: train it anew ({first_line(error)})") from error


def load_student(folder, teacher=None, device="cpu"):
    """Load a student and its tokenizer from a run, or from a folder that the student's own `save_pretrained` wrote.

    teacher: where the teacher of the run is now; None: where it was in training. The student's weights are its own. Raises
    InputError if there is neither, if it is cut short, or if the teacher is not the one that the run was trained on.
    """
    code = Path(folder) / "lft.py"
    if (Path(folder) / "config.json").exists():
        try:
            if code.exists() and code.read_bytes() != Path(__file__).read_bytes():
                print(f"note: {code} differs from {__file__}, and the latter is used", file=sys.stderr)
            student = LFTForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return student.to(device), AutoTokenizer.from_pretrained(folder, config=student.config)
        except UNREADABLE as error:
            raise InputError(f"the student in {folder} is damaged, or none: save it anew ({first_line(error)})") from error
    config, weights = read_run(folder)
    teacher, tokenizer = load_teacher(teacher or config.teacher)
    if fingerprint(teacher) != config.fingerprint:
        raise InputError(f"run {folder} was trained on another teacher, {config.teacher} as it was then: give that one by --teacher")
    student = LFTForCausalLM(config, teacher)
    try:
        student.flow.velocity.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"run {folder} was built by another velocity class of the same name: use the code that trained it") from error
    return student.requires_grad_(True).eval().to(device), tokenizer  # ready to be tuned end to end


# 8. What the scripts share


def pick_device(name=None):
    """The device of that name; None: a CUDA GPU if there is one. A process of torchrun gets a GPU of its own.

    Raises InputError if it is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what NCCL gathers by, and what torch.cuda.synchronize waits for
        return device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise InputError(f"--device {name} is not there: use --device cpu") from error


def run_script(main):
    """Run a script's main function; bad input ends in its one sentence on standard error, and exit status 2."""
    logging.disable_progress_bar()  # what goes wrong while loading is said once, by us
    logging.set_verbosity_error()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # nobody reads on (`| head -1`)
        sys.stdout = open(os.devnull, "w")
