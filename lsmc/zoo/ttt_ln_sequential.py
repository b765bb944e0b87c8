"""Test-time training, linear with layer norm, one token after the other: `ttt_ln` with blocks of one token, M⁰ = M, m⁰ = m.

Inputs as there. The state is the pair (M, m).
Sun et al. 2024, "Learning to (Learn at Test Time)" (arXiv 2407.04620), TTT-Linear as online gradient descent.
"""

from lsmc import LSM, M, grad
from lsmc.zoo.ttt_ln import eta, loss, readout

ttt_ln_sequential = LSM("ttt_ln_sequential", block=1, update=-eta * grad(loss, M), readout=readout)
