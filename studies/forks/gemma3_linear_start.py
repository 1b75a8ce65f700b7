"""A flow for Gemma 2 and 3 that starts at the least-squares map of x0."""

try:
    from .gemma3 import Gemma3Block  # the copies in a run's folder
    from .linear_start import LinearStartConfig, LinearStartForCausalLM
except ImportError:
    from gemma3 import Gemma3Block
    from linear_start import LinearStartConfig, LinearStartForCausalLM


class Gemma3LinearStartConfig(LinearStartConfig):
    pass


class Gemma3LinearStart(LinearStartForCausalLM):
    config_class = Gemma3LinearStartConfig
    velocity_class = Gemma3Block
    block_class = Gemma3Block


Gemma3LinearStartConfig.register_for_auto_class()
Gemma3LinearStart.register_for_auto_class("AutoModelForCausalLM")
