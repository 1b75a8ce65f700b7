"""The Latent Flow Transformer (arXiv 2505.14513).

A pretrained language model, the teacher, moves a hidden state from layer to layer. We remove the layers from `start` up
to, but not including, `end` (6 -> 18 removes layers 6..17), and learn one velocity field u(x, t) that carries the state
across the gap:

    x0, entering layer `start`   -- dx/dt = u(x, t), t from 0 to 1 -->   x1, entering layer `end`

What is left of the teacher plus the learned flow is the student, a transformers model. A copy of this file is saved
with every student, so it imports only torch and transformers.

Shapes: token ids are (batch, seq); hidden states, called x, are (batch, seq, hidden). A layer's context is the keyword
arguments that the teacher calls it with besides x: attention mask, rotary embedding and KV cache.
"""

import copy
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer


class InputError(ValueError):
    """The input cannot be used; the message is one sentence that says what to do."""


# ---- 1. The velocity field

TIME_CHANNELS = 128
MAX_FREQUENCY = 1000.0  # radians per unit of t; DiT has 1 radian per timestep, and 1000 timesteps. Our lowest is 1.


def time_embedding(t, like):
    """Sines and cosines of t, in the dtype of the tensor `like`: (1 or batch, 1, TIME_CHANNELS).

    t: a number or (batch, 1, 1).
    """
    frequencies = torch.logspace(0, 1, TIME_CHANNELS // 2, base=MAX_FREQUENCY, dtype=torch.float32, device=like.device)
    angles = t * frequencies[None, None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


class VelocityBlock(nn.Module):
    """The velocity field u(x, t): a transformer layer without its outer residual, conditioned on t like DiT's (Fig. 1).

        u(x, t) = α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2)

    y is x in Pythia's parallel layers, and x plus the attention branch in others. Six vectors are computed from t: β,
    γ - 1 and α - 1 for each branch. They start at 0, so that at first x + u(x, t) is the copied layer, for every t. In
    DiT the gates α start at 0.
    """

    def __init__(self, layer):
        super().__init__()
        layer = copy.deepcopy(layer)
        self.norm1 = layer.input_layernorm
        self.attention = layer.attention if hasattr(layer, "attention") else layer.self_attn  # GPT-NeoX: attention
        self.norm2 = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.parallel = getattr(layer, "use_parallel_residual", False)
        hidden = self.attention.config.hidden_size
        last = nn.Linear(TIME_CHANNELS, 6 * hidden)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.modulation = nn.Sequential(nn.Linear(TIME_CHANNELS, TIME_CHANNELS), nn.SiLU(), last)
        self.requires_grad_(True)  # the copied layer was frozen

    def forward(self, x, t, **context):
        """The velocity at state x and time t, a number or (batch, 1, 1)."""
        vectors = self.modulation(time_embedding(t, x)).to(x.dtype)  # autocast makes them bfloat16
        beta1, scale1, gate1, beta2, scale2, gate2 = vectors.chunk(6, dim=-1)  # each (1 or batch, 1, hidden)
        gamma1 = 1 + scale1
        alpha1 = 1 + gate1
        gamma2 = 1 + scale2
        alpha2 = 1 + gate2
        attention, _ = self.attention(gamma1 * self.norm1(x) + beta1, **context)
        branch1 = alpha1 * attention
        y = x if self.parallel else x + branch1
        branch2 = alpha2 * self.mlp(gamma2 * self.norm2(y) + beta2)
        return branch1 + branch2


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


def equal_times(k):
    """The times of k equal steps: 0, 1/k, …, 1."""
    return [i / k for i in range(k + 1)]


# ---- 3. The flow in place of the span
class FlowLayer(GradientCheckpointingLayer):
    """Carries x0 to x1 in k equal solver steps (Alg. 3); it is called like the decoder layers that it replaces.

    In generation the context has a KV cache, of which every evaluation of u needs a part of its own: see FlowCache.
    """

    def __init__(self, velocity, solver="midpoint", k=3):
        super().__init__()
        self.velocity = velocity
        self.solver = solver
        self.k = k
        self.layer_idx = None  # replace_span sets layer_idx, this layer's number, and config, the model's configuration

    def forward(self, x, **context):
        cache = None
        for name, value in context.items():
            if isinstance(value, Cache):  # the argument's name depends on the version of transformers
                cache = FlowCache(value, self)
                context[name] = cache
            elif type(value).__name__ == "PagedAttentionCache":
                raise InputError("continuous batching keeps one slot for each layer, a flow needs more: use generate")
        u = functools.partial(self.velocity, **context)
        x = integrate(u, x, equal_times(self.k), self.solver)
        if cache is not None:
            cache.check()
        return x


def share(module):
    """A copy of a module that uses the same weight tensors.

    Changing the copy's structure leaves the original alone; changing a weight changes both.
    """
    memo = {id(weight): weight for weight in module.parameters()}  # deepcopy does not copy what it finds here
    return copy.deepcopy(module, memo)


def replace_span(teacher, start, end, replacement=None):
    """The teacher with layers start..end-1 replaced by one layer, or removed; a model that shares its weights.

    replacement: a FlowLayer, or any module that is called like a decoder layer; its weights are shared too.
    Raises InputError if the span does not fit.
    """
    n = len(teacher.get_decoder().layers)
    if not 0 <= start < end <= n:
        raise InputError(f"{start} -> {end} is not a span of {n} layers: give 0 <= start < end <= {n}")
    new = []
    if replacement is not None:
        new.append(share(replacement))
    model = share(teacher)
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList([*decoder.layers[:start], *new, *decoder.layers[end:]])
    model.config.num_hidden_layers = len(decoder.layers)
    types = getattr(model.config, "layer_types", None)  # of attention: full or sliding
    if types:  # a replacement gets the mask of layer `start`
        model.config.layer_types = types[:start] + types[start : start + len(new)] + types[end:]
    # Renumber the slots of the KV cache, and point every attention and flow to the changed configuration.
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
                module.config = model.config
    return model


# ---- 4. The training pair
def trunk_of(teacher, end):
    """The teacher's decoder with only the layers before `end`."""
    trunk = share(teacher.get_decoder())
    trunk.layers = trunk.layers[:end]
    trunk.config.num_hidden_layers = end
    return trunk


@torch.no_grad()
def hidden_pair(trunk, ids, start):
    """The states x0 and x1 of the same tokens, and the context of layer `start`.

    trunk: `trunk_of(teacher, end)`. ids: (batch, seq), without padding.
    """
    seen = {}

    def enter(layer, args, context):
        seen["x0"] = args[0]
        seen["context"] = context

    def leave(layer, args, output):
        seen["x1"] = output

    hooks = [
        trunk.layers[start].register_forward_pre_hook(enter, with_kwargs=True),
        trunk.layers[-1].register_forward_hook(leave),
    ]
    trunk(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen["x0"], seen["x1"], seen["context"]


# ---- 5. Measures that the losses use
TOKEN_POWER = 1.0  # our default; 0 is the paper's plain mean


def token_weights(x1, power=TOKEN_POWER):
    """Weight of each token's squared error, 1 / RMS(x1)^power: (batch, seq, hidden) -> (batch, seq).

    Language models give a few tokens, above all the first, states hundreds of times longer than the rest (massive
    activations). With power 0 those few tokens are almost the whole mean; with 2, as in the NMSE, they hardly count.
    """
    rms = x1.square().mean(dim=-1).sqrt()
    floor = 1e-3 * rms.mean()  # only a state of almost zero is below; its weight would be infinite
    return torch.maximum(rms, floor) ** -power


def kl_divergence(log_p, log_q):
    """KL(p || q) = Σ p (log p - log q), p the teacher's: (batch, seq, vocabulary) twice -> (batch, seq)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


# The method ends here; the losses are in train_fm.py and train_fw.py. What follows makes the student a transformers
# model, with a KV cache for generation.


# ---- 6. The KV cache
class FlowCache:
    """The KV cache as the velocity sees it during one forward pass: every evaluation has a slot of its own.

    The first evaluation uses the slot of the flow's layer, the others use slots after those of all layers. Example: of
    24 layers, 6 -> 18 leaves 12. With the flow, which is layer 6, the student has layers 0 to 12. Midpoint x3 makes 6
    evaluations; they use slots 6, 13, 14, 15, 16 and 17. This list is stored on the cache, not on the model, because a
    model may be used with several caches.
    """

    def __init__(self, cache, flow):
        self.cache = cache
        self.flow = flow
        self.calls = 0
        self.filled = cache.get_seq_length(flow.layer_idx) > 0
        if not self.filled:
            own = cache.layers[flow.layer_idx : flow.layer_idx + 1]  # [] if the cache grows in update()
            self.empty = copy.deepcopy(own)
        if not hasattr(cache, "flow_slots"):
            cache.flow_slots = {}
        self.slots = cache.flow_slots.setdefault((flow.layer_idx, flow.solver, flow.k), [])

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Called by the attention, in place of the cache's own method."""
        if self.calls == len(self.slots):
            if self.filled:
                self.refuse()
            self.slots.append(self.new_slot())
        slot = self.slots[self.calls]
        self.calls += 1
        return self.cache.update(keys, values, slot, *args, **kwargs)

    def new_slot(self):
        """The number of a slot for this evaluation, which is appended to the cache if it is not the flow's own."""
        if self.calls == 0:
            return self.flow.layer_idx
        layers = self.cache.layers
        slot = max(len(layers), self.flow.config.num_hidden_layers)
        layers.extend(copy.deepcopy(self.empty))  # appends nothing to a cache that grows in update()
        return slot

    def check(self):
        """Called after the walk: fewer evaluations than before would leave keys and values of older tokens only."""
        if self.calls != len(self.slots):
            self.refuse()

    def refuse(self):
        raise InputError("this KV cache has another solver, k or number of evaluations: start a new one, or use none")


# ---- 7. The student
class LFTConfig(PreTrainedConfig):
    """The student's configuration.

    teacher: its name. teacher_config: its configuration, a dict. init: the layer that the velocity was copied from.
    solver, k: how the flow is integrated. training: the options of the run, and hashes of what it was made from.
    text_config: the configuration of the shorter decoder, which the model sets.
    """

    model_type = "lft"
    sub_configs = {"text_config": AutoConfig}

    teacher: str = None
    teacher_config: dict = None
    start: int = 0
    end: int = 1
    init: int = 0
    solver: str = "midpoint"
    k: int = 3
    training: dict = None
    text_config: PreTrainedConfig = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):  # read from a file
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


class LFTForCausalLM(PreTrainedModel, GenerationMixin):
    """The student: the teacher with its span replaced by a FlowLayer. `from_pretrained` makes it without the teacher.

    A fork with another velocity or solver is a subclass in a file of its own beside this one, such as those in
    studies/forks. It names its velocity in `velocity_class`, adds its solver to SOLVERS, and registers itself and a
    configuration as below. A copy of that file is saved with the student, too; there it imports this file as `.lft`.
    """

    config_class = LFTConfig
    velocity_class = VelocityBlock
    block_class = VelocityBlock  # what velocity_class is built of; training checks that it fits the teacher's layers
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config, teacher=None):
        super().__init__(config)
        if teacher is None:
            teacher_config = AutoConfig.for_model(**config.teacher_config)
            if config.text_config is not None:
                teacher_config.vocab_size = config.text_config.vocab_size  # embeddings may have been resized
            teacher = AutoModelForCausalLM.from_config(teacher_config, attn_implementation=config._attn_implementation)
        else:
            self.generation_config = copy.deepcopy(teacher.generation_config)
        velocity = self.velocity_class(teacher.get_decoder().layers[config.init])
        self.model = replace_span(teacher, config.start, config.end, FlowLayer(velocity, config.solver, config.k))
        self.config.text_config = self.model.config
        self.post_init()

    def init_weights(self):
        self.tie_weights()  # no initialization: the weights are the teacher's, or about to be loaded

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new):
        self.model.set_output_embeddings(new)

    @property
    def flow(self):
        return self.get_decoder().layers[self.config.start]

    def set_solver(self, solver, k):
        """Integrate in k steps of this solver from now on. A KV cache that was filled before cannot be used again."""
        self.config.solver = solver
        self.config.k = k
        self.flow.solver = solver
        self.flow.k = k

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, logits_to_keep=0, **kwargs):
        """As any causal LM of transformers; `generate` and Trainer look for these names."""
        if kwargs.get("output_hidden_states"):  # transformers records only the teacher's kind of layer
            raise InputError("output_hidden_states would leave out the flow's input: use forward hooks instead")
        return self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


LFTConfig.register_for_auto_class()
LFTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
