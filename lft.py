"""The Latent Flow Transformer (arXiv 2505.14513): the method, in the order of a whiteboard.

A pretrained language model, the teacher, moves a hidden state from layer to layer. We remove the layers from `start` up to, but
not including, `end` (6 -> 18 removes layers 6..17), and learn one velocity field u(x, t) that carries the state across the gap:

    x0, the state entering layer `start`   -- dx/dt = u(x, t), t from 0 to 1 -->   x1, the state entering layer `end`

What is left of the teacher plus the learned flow is the student, a transformers model. A copy of this file is saved with every
student, so it imports only torch and transformers. Token ids are (batch, seq); hidden states, called x, are (batch, seq, hidden).
"""
import copy
import itertools
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


class InputError(ValueError):
    """The input cannot be used; the message is one sentence that says what to do."""


# ---- 1. The velocity field

TIME_CHANNELS = 128
MAX_FREQUENCY = 1000.0  # radians per unit of t; the lowest frequency is 1


class VelocityBlock(nn.Module):
    """The velocity field u(x, t): a transformer layer without its outer residual, conditioned on t as in DiT (paper, Fig. 1).

        u(x, t) = α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2)

    Six vectors computed from t shift (β), scale (γ) and gate (α) the two branches. y is x in Pythia's parallel layers, and x plus
    the attention branch in others. At first α = γ = 1 and β = 0 for every t, so x + u(x, t) is the layer that was copied.
    """

    def __init__(self, layer):
        super().__init__()
        attention = layer.attention if hasattr(layer, "attention") else layer.self_attn  # GPT-NeoX's name, and everyone else's
        self.norm1, self.attention = copy.deepcopy(layer.input_layernorm), copy.deepcopy(attention)
        self.norm2, self.mlp = copy.deepcopy(layer.post_attention_layernorm), copy.deepcopy(layer.mlp)
        self.parallel = getattr(layer, "use_parallel_residual", False)
        last = nn.Linear(TIME_CHANNELS, 6 * attention.config.hidden_size)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, TIME_CHANNELS), nn.SiLU(), last)
        for weight in last.parameters():
            nn.init.zeros_(weight)
        self.requires_grad_(True)  # the teacher's weights, which were copied, are frozen

    def forward(self, x, t, **context):
        """The velocity at state x and time t, a number or (batch, 1, 1). context: mask, rotary embedding, KV cache."""
        frequencies = torch.logspace(0, 1, TIME_CHANNELS // 2, base=MAX_FREQUENCY, dtype=torch.float32, device=x.device)
        angles = t * frequencies  # (channels / 2,) or (batch, 1, channels / 2)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)
        # In DiT's names: β = shift, γ = 1 + scale, α = 1 + gate. Each is (hidden,) or (batch, 1, hidden).
        shift1, scale1, gate1, shift2, scale2, gate2 = self.time_mlp(embedding).to(x.dtype).chunk(6, dim=-1)
        attention, _ = self.attention(self.norm1(x) * (1 + scale1) + shift1, **context)
        attention = (1 + gate1) * attention
        y = x if self.parallel else x + attention
        return attention + (1 + gate2) * self.mlp(self.norm2(y) * (1 + scale2) + shift2)


# ---- 2. The solvers: one step from time t to time s, each a number or (batch, 1, 1)
def euler(velocity, x, t, s):
    """One Euler step (Eq. 4): x + d·u(x, t), where d = s - t."""
    return x + (s - t) * velocity(x, t)


def midpoint(velocity, x, t, s):
    """One midpoint step (Eq. 5): x + d·u(x + d/2·u(x, t), t + d/2), where d = s - t."""
    d = s - t
    halfway = x + d / 2 * velocity(x, t)
    return x + d * velocity(halfway, t + d / 2)


SOLVERS = {"euler": euler, "midpoint": midpoint}


def integrate(velocity, x, times, solver="midpoint"):
    """Walk x through a list of times; each step starts where the last one landed (Alg. 2 and 3)."""
    for t, s in itertools.pairwise(times):
        x = SOLVERS[solver](velocity, x, t, s)
    return x


# ---- 3. The flow in place of the span
class FlowCache:
    """The KV cache as the velocity sees it during one forward pass: each evaluation has its own slot.

    The first uses the layer's slot, the others use slots appended after those of the model's n layers. The cache remembers which
    is which; the model does not, since it may be used with several caches at once.
    """

    def __init__(self, cache, n, steps):
        self.cache, self.n, self.steps, self.number = cache, n, steps, itertools.count()

    def update(self, keys, values, slot, *args, **kwargs):
        layers, slots = self.cache.layers, vars(self.cache).setdefault("flow_slots", {})
        number = next(self.number)
        call = (slot, self.steps, number)
        if call not in slots and number == 0:  # take the layer's slot, and keep a copy of it while it is empty
            if self.cache.get_seq_length(slot):
                raise InputError("this KV cache was filled with another solver or k: start a new one")
            slots[call], self.empty = slot, copy.deepcopy(layers[slot : slot + 1])
        elif call not in slots:  # append an empty copy; there is none to copy if the cache adds slots by itself
            slots[call] = max(len(layers), self.n)
            layers += copy.deepcopy(self.empty)
        return self.cache.update(keys, values, slots[call], *args, **kwargs)


class FlowLayer(GradientCheckpointingLayer):
    """Carries x0 to x1 in k equal solver steps (Alg. 3); it is called like the decoder layers that it replaces."""

    def __init__(self, velocity, solver="midpoint", k=3):
        super().__init__()
        self.velocity, self.solver, self.k = velocity, solver, k
        self.config = self.layer_idx = None  # the model's config and this layer's index, set by replace_span

    def walk(self, u, x):
        return integrate(u, x, [i / self.k for i in range(self.k + 1)], self.solver)

    def forward(self, x, **context):
        name = "layer_past" if "layer_past" in context else "past_key_values"  # GPT-NeoX's name, and everyone else's
        if context.get(name) is not None:
            context[name] = FlowCache(context[name], self.config.num_hidden_layers, (self.solver, self.k))
        return self.walk(lambda x, t: self.velocity(x, t, **context), x)


def check_span(model, start, end):
    n = len(model.get_decoder().layers)
    if not 0 <= start < end <= n:
        raise InputError(f"{start} -> {end} is not a span of {n} layers: give 0 <= start < end <= {n} (6 -> 18 is layers 6..17)")


def share(model):
    """A deep copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})  # deepcopy keeps these as they are


def replace_span(teacher, start, end, layer=None):
    """The teacher with layers start..end-1 replaced by one layer, or removed; a model that shares the teacher's weights.

    layer: a FlowLayer, or any module that is called like a decoder layer; its attention gets the slot of layer `start` in the KV
    cache. Raises InputError if the span does not fit.
    """
    check_span(teacher, start, end)
    model = share(teacher)
    config, decoder, new = model.config, model.get_decoder(), [] if layer is None else [layer]
    layers = decoder.layers = nn.ModuleList([*decoder.layers[:start], *new, *decoder.layers[end:]])
    config.num_hidden_layers = len(layers)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [*types[:start], *types[start : start + len(new)], *types[end:]]
    for slot, each in enumerate(layers):
        for module in each.modules():
            if hasattr(module, "layer_idx"):  # an attention, which keeps keys and values in this slot of the KV cache
                module.layer_idx, module.config = slot, config
    return model


# ---- 4. The training pair
def trunk_of(teacher, end):
    """The teacher's decoder up to layer `end`, without the final norm: it returns x1."""
    n = len(teacher.get_decoder().layers)
    trunk = (replace_span(teacher, end, n) if end < n else share(teacher)).get_decoder()
    setattr(trunk, "final_layer_norm" if hasattr(trunk, "final_layer_norm") else "norm", nn.Identity())
    return trunk


@torch.no_grad()
def hidden_pair(trunk, ids, start):
    """The states x0 and x1 of the same tokens, and the context (mask, rotary embedding) of layer `start`, for the velocity.

    trunk: `trunk_of(teacher, end)`. ids: (batch, seq), without padding.
    """
    calls = []
    hook = trunk.layers[start].register_forward_pre_hook(lambda _, x, context: calls.append((x[0], context)), with_kwargs=True)
    x1 = trunk(ids, use_cache=False).last_hidden_state
    hook.remove()
    x0, context = calls[0]
    return x0, x1, context


# ---- 5. The teacher
def load(kind, path):
    """`kind.from_pretrained`, frozen and in float32. Raises InputError for missing or unexpected weights."""
    model, report = kind.from_pretrained(path, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if wrong := {*report["missing_keys"], *report["unexpected_keys"]}:
        raise InputError(f"its weights do not fit its configuration and code: {min(wrong)} is missing or unexpected")
    return model.requires_grad_(False).eval()


def load_teacher(name, device="cpu"):
    """A frozen causal LM in float32, and its tokenizer. name: tiny_teacher, a folder, or a model on the hub.

    Raises InputError if they cannot be loaded, or if weights, configuration and tokenizer do not belong together.
    """
    path = Path(__file__).parent / name if name == "tiny_teacher" else name
    try:
        teacher, tokenizer = load(AutoModelForCausalLM, path), AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and the packages that it calls raise many kinds
        raise InputError(f"cannot load the teacher {name}: use a folder, a model on the hub, or tiny_teacher") from error
    if not all(weight.is_floating_point() for weight in teacher.state_dict().values()):
        raise InputError(f"the weights of teacher {name} are quantized to integers: use the unquantized model")
    if not tokenizer("text")["input_ids"] or tokenizer.eos_token_id is None or len(tokenizer) > teacher.config.vocab_size:
        raise InputError(f"the teacher {name} has no tokenizer that fits it: put the tokenizer's files into its folder")
    vars(teacher.config).pop("quantization_config", None)  # of weights that were dequantized on loading
    return teacher.to(device), tokenizer


@torch.no_grad()
def check_layers(teacher, layers):
    """Check that x + u(x, t), with u a new VelocityBlock, equals the output of each listed layer, or raise InputError."""
    ids, shapes = torch.arange(8, device=teacher.device)[None], []
    for number in layers:
        try:
            layer = teacher.get_decoder().layers[number]
            shapes.append([weight.shape for weight in layer.parameters()])
            x0, x1, context = hidden_pair(trunk_of(teacher, number + 1), ids, number)
            error = (x0 + VelocityBlock(layer).to(x0)(x0, 0.0, **context) - x1).norm() / (x1 - x0).norm()
            if not error <= 1e-4:
                raise ValueError(f"x + u(x, t) misses its output by {error:.1%} of the update")
            if shapes[0] != shapes[-1]:
                raise ValueError(f"its weights are not shaped like those of layer {layers[0]}")
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"VelocityBlock does not fit layer {number} of this {teacher.config.model_type}: {error}") from None


# ---- 6. The student
class LFTConfig(PreTrainedConfig):
    """teacher_config: the teacher's configuration, a dict. teacher: its name. training: the run's options and hashes."""

    model_type = "lft"
    sub_configs = {"text_config": AutoConfig}

    def __init__(self, teacher_config=None, start=0, end=1, solver="midpoint", k=3, teacher=None, training=None, **kwargs):
        self.teacher_config, self.start, self.end, self.solver, self.k = teacher_config, start, end, solver, k
        self.teacher, self.training = teacher, training or {}
        self.text_config = AutoConfig.for_model(**teacher_config) if teacher_config else None  # later the shorter decoder's
        super().__init__(**{name: value for name, value in kwargs.items() if name != "text_config"})


class LFTForCausalLM(PreTrainedModel, GenerationMixin):
    """The student: the teacher with its span replaced by a FlowLayer. Without a teacher, `from_pretrained` loads all weights."""

    config_class = LFTConfig
    velocity_class = VelocityBlock
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config, teacher=None):
        super().__init__(config)
        if teacher:
            self.generation_config = copy.deepcopy(teacher.generation_config)
        teacher = teacher or AutoModelForCausalLM.from_config(config.text_config)
        check_span(teacher, config.start, config.end)
        velocity = self.velocity_class(teacher.get_decoder().layers[config.start])
        self.model = replace_span(teacher, config.start, config.end, FlowLayer(velocity, config.solver, config.k))
        self.config.text_config = self.model.config
        self.post_init()

    def init_weights(self):
        self.tie_weights()  # no initialization: the weights are the teacher's, or about to be loaded

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    @property
    def flow(self):
        return self.get_decoder().layers[self.config.start]

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0, **kwargs):
        """As any causal LM of transformers; `generate` looks for these names."""
        if kwargs.get("output_hidden_states"):  # transformers records only the teacher's kind of layer
            raise InputError("output_hidden_states would leave out the flow's input: use forward hooks instead")
        self.flow.solver, self.flow.k = self.config.solver, self.config.k
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        return self.model(input_ids, logits_to_keep=logits_to_keep, **kwargs)


LFTConfig.register_for_auto_class()
LFTForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def run_script(main):
    """Call a script's main function; common mistakes end in one sentence and exit status 2."""
    logging.disable_progress_bar()
    try:
        main()
    except (InputError, OSError, EOFError) as error:  # for example a full disk, a closed pipe, a truncated file
        cause = str(error.__cause__ or "").strip().split("\n")[0]
        print(f"error: {error}" + (f" ({cause})" if cause else ""), file=sys.stderr)
        sys.exit(2)
