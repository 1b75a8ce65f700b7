"""A flow that starts at W x0 + b, the linear map from x0 to x1 by least squares, which is saved with the student."""

from torch import nn

try:
    from .lft import LFTConfig, LFTForCausalLM  # the copy in a run's folder
except ImportError:
    from lft import LFTConfig, LFTForCausalLM


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
    """A student whose velocity also holds the frozen map `linear`, which train_linear_start.py fits."""

    config_class = LinearStartConfig

    def __init__(self, config, teacher=None):
        super().__init__(config, teacher)
        layers = self.get_decoder().layers
        layers[config.start] = LinearStart(layers[config.start])
        hidden = self.get_input_embeddings().embedding_dim
        self.flow.velocity.linear = nn.Linear(hidden, hidden).requires_grad_(False)
        self.post_init()

    @property
    def flow(self):
        return self.get_decoder().layers[self.config.start].flow


LinearStartConfig.register_for_auto_class()
LinearStartForCausalLM.register_for_auto_class("AutoModelForCausalLM")
