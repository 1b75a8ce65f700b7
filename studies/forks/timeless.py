"""A velocity that never sees t: its modulation stays at zero."""

try:
    from .lft import LFTConfig, LFTForCausalLM, VelocityBlock  # the copy in a run's folder
except ImportError:
    from lft import LFTConfig, LFTForCausalLM, VelocityBlock


class TimelessBlock(VelocityBlock):
    def __init__(self, layer):
        super().__init__(layer)
        self.modulation.requires_grad_(False)


class TimelessConfig(LFTConfig):
    pass


class TimelessForCausalLM(LFTForCausalLM):
    config_class = TimelessConfig
    velocity_class = TimelessBlock


TimelessConfig.register_for_auto_class()
TimelessForCausalLM.register_for_auto_class("AutoModelForCausalLM")
