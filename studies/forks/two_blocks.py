"""A velocity of two stacked blocks, each of which carries the state half of the way."""

from torch import nn

try:
    from .lft import LFTConfig, LFTForCausalLM, VelocityBlock  # the copy in a run's folder
except ImportError:
    from lft import LFTConfig, LFTForCausalLM, VelocityBlock


class TwoBlocks(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first = VelocityBlock(layer)
        self.second = VelocityBlock(layer)

    def forward(self, x, t, **context):
        half = self.first(x, t, **context) / 2
        return half + self.second(x + half, t, **context) / 2


class TwoBlocksConfig(LFTConfig):
    pass


class TwoBlocksForCausalLM(LFTForCausalLM):
    config_class = TwoBlocksConfig
    velocity_class = TwoBlocks


TwoBlocksConfig.register_for_auto_class()
TwoBlocksForCausalLM.register_for_auto_class("AutoModelForCausalLM")
