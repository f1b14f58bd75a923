"""LA-LoRA (Liu et al. 2026, arXiv 2602.19926): sites move B and A in turn, step by step; the server averages both.

What is particular happens at the site (``client/trainer.py``). With clipped and noised gradients g̃ and a low-pass
filter G (``phase.smoothing``), odd steps take B ← B - η G(g̃_B) and even steps A ← A - η G(g̃_A); what a step does not
move is neither clipped nor noised in it. The server does what ``fedit`` does, so the product of the means is not the
mean of the products. Under DP a step's noise falls on one matrix alone, and over a round noise in A and B still
multiplies. With secure sums: works as it is.
"""

from __future__ import annotations

from server.aggregation.base import FedOpt, register


@register("la-lora")
class LALoRA(FedOpt):
    """Averages every released tensor."""
