"""A velocity for Gemma 2 and 3, whose layers also normalize what attention and MLP return."""

import copy

from torch import nn

try:
    from .lft import LFTConfig, LFTForCausalLM, VelocityBlock  # the copy in a run's folder
except ImportError:
    from lft import LFTConfig, LFTForCausalLM, VelocityBlock


class NormedAttention(nn.Module):
    """Attention and the norm of its output, called like attention."""

    def __init__(self, attention, norm):
        super().__init__()
        self.attention = attention
        self.norm = norm

    def forward(self, x, **context):
        output, weights = self.attention(x, **context)
        return self.norm(output), weights


class Gemma3Block(VelocityBlock):
    def __init__(self, layer):
        super().__init__(layer)
        layer = copy.deepcopy(layer)
        self.attention = NormedAttention(self.attention, layer.post_attention_layernorm)
        self.norm2 = layer.pre_feedforward_layernorm
        self.mlp = nn.Sequential(self.mlp, layer.post_feedforward_layernorm)
        self.requires_grad_(True)  # the copied norms were frozen


class Gemma3Config(LFTConfig):
    pass


class Gemma3Student(LFTForCausalLM):
    config_class = Gemma3Config
    velocity_class = Gemma3Block
    block_class = Gemma3Block


Gemma3Config.register_for_auto_class()
Gemma3Student.register_for_auto_class("AutoModelForCausalLM")
