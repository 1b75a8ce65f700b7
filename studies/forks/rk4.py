"""Another solver: the classical Runge-Kutta method of fourth order, 4 evaluations of the velocity in a step."""

try:
    from .lft import SOLVERS, LFTConfig, LFTForCausalLM  # the copy in a run's folder
except ImportError:
    from lft import SOLVERS, LFTConfig, LFTForCausalLM


def rk4(velocity, x, t, s):
    d = s - t
    slope1 = velocity(x, t)
    slope2 = velocity(x + d / 2 * slope1, t + d / 2)
    slope3 = velocity(x + d / 2 * slope2, t + d / 2)
    slope4 = velocity(x + d * slope3, s)
    return x + d / 6 * (slope1 + 2 * slope2 + 2 * slope3 + slope4)


SOLVERS["rk4"] = rk4


class RK4Config(LFTConfig):
    pass


class RK4ForCausalLM(LFTForCausalLM):
    config_class = RK4Config


RK4Config.register_for_auto_class()
RK4ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
