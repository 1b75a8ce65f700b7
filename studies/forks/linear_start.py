"""A flow that starts at W x0 + b, the linear map from x0 to x1 by least squares, which is saved with the student."""

from torch import nn

try:
    from .lft import LFTConfig, LFTForCausalLM, VelocityBlock  # the copy in a run's folder
except ImportError:
    from lft import LFTConfig, LFTForCausalLM, VelocityBlock


class LinearStartBlock(VelocityBlock):
    """The velocity, at first 0 (α = 0), and the frozen map `linear`, which train_linear_start.py fits."""

    def __init__(self, layer):
        super().__init__(layer)
        hidden = self.attention.config.hidden_size
        self.linear = nn.Linear(hidden, hidden).requires_grad_(False)
        vectors = self.modulation[-1].bias.data.view(6, hidden)  # shift, scale and gate of each branch
        vectors[2].fill_(-1.0)
        vectors[5].fill_(-1.0)


class LinearStart(nn.Module):
    """The flow, entered at W x0 + b."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, **context):
        return self.flow(self.flow.velocity.linear(x), **context)


class LinearStartConfig(LFTConfig):
    pass


class LinearStartForCausalLM(LFTForCausalLM):
    config_class = LinearStartConfig
    velocity_class = LinearStartBlock

    def __init__(self, config, teacher=None):
        super().__init__(config, teacher)
        layers = self.get_decoder().layers
        layers[config.start] = LinearStart(layers[config.start])
        self.post_init()

    @property
    def flow(self):
        return self.get_decoder().layers[self.config.start].flow


LinearStartConfig.register_for_auto_class()
LinearStartForCausalLM.register_for_auto_class("AutoModelForCausalLM")
